//! A running agent, its log, and clients of it.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use tether_proto::wire;
use tether_proto::wire::storage_agent_client::StorageAgentClient;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::Status;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::pki::{Authority, Certified, Kind};

/// How long anything may take to be seen.
const PATIENCE: Duration = Duration::from_secs(30);
/// The name in the agent's certificate.
pub(crate) const NAME: &str = "storage1";

/// A storage agent without pools, as a process. It ends with this.
pub(crate) struct Agent {
    process: Child,
    directory: tempfile::TempDir,
    pub(crate) authority: Authority,
    pub(crate) address: SocketAddr,
    log: watch::Receiver<Vec<String>>,
}

impl Agent {
    pub(crate) async fn start() -> Self {
        Self::start_with("").await
    }

    /// `more` goes to the end of `[server]`.
    pub(crate) async fn start_with(more: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::new("authority");
        let at = |name: &str| directory.path().join(name);
        let text = format!(
            "state_directory = {state:?}\n[server]\nlisten = \"127.0.0.1:0\"\nsocket = {socket:?}\n\
             certificate = {certificate:?}\nkey = {key:?}\nca = {ca:?}\n{more}",
            state = at("state"),
            socket = at("agent.sock"),
            certificate = at("agent.crt"),
            key = at("agent.key"),
            ca = at("ca.crt"),
        );
        std::fs::write(at("agent.toml"), text).unwrap();
        write_certificates(
            directory.path(),
            &authority,
            &authority.issue(Kind::Server, "tether-agent", NAME),
        );
        #[expect(
            clippy::disallowed_methods,
            reason = "a daemon that the test stops, not a program that ends"
        )]
        let mut process = std::process::Command::new(env!("CARGO_BIN_EXE_tether-storage-agent"))
            .arg("--config")
            .arg(at("agent.toml"))
            // The audit is written all the same.
            .args(["--log", "warn,tether_agent_core=info"])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let (sender, log) = watch::channel(Vec::new());
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                sender.send_modify(|log: &mut Vec<String>| log.push(line));
            }
        });
        let mut agent =
            Self { process, directory, authority, address: SocketAddr::from(([127, 0, 0, 1], 0)), log };
        let line = agent.line(&["listening"]).await;
        agent.address = field(&line, "address").parse().unwrap();
        agent.line(&["ready"]).await;
        agent
    }

    /// How long all threads of the agent have been on a processor: proc(5), `schedstat`, nanoseconds first.
    pub(crate) fn processor_time(&self) -> Duration {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.process.id())).unwrap();
        let of_one = |thread: std::fs::DirEntry| -> Option<u64> {
            let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse().ok()
        };
        Duration::from_nanos(threads.filter_map(|thread| of_one(thread.ok()?)).sum())
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Puts other certificates in place.
    pub(crate) fn replace_certificates(&self, authority: &Authority, agent: &Certified) {
        write_certificates(self.directory.path(), authority, agent);
    }

    /// A client's certificate with a role's own unit.
    pub(crate) fn client(&self, role: &str) -> Certified {
        self.authority.issue(Kind::Client, &format!("tether-{role}"), &format!("my-{role}"))
    }

    /// Connects with a certificate, or with none.
    pub(crate) async fn connect(&self, client: Option<&Certified>) -> Result<Storage, Status> {
        self.connect_to(NAME, &self.authority, client).await
    }

    /// The same, with other thoughts about who the agent is. What goes wrong may show at the first call only.
    pub(crate) async fn connect_to(
        &self,
        name: &str,
        authority: &Authority,
        client: Option<&Certified>,
    ) -> Result<Storage, Status> {
        let mut tls =
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&authority.pem)).domain_name(name);
        if let Some(client) = client {
            tls = tls.identity(Identity::from_pem(&client.certificate, &client.key));
        }
        let endpoint = Endpoint::from_shared(format!("https://{}", self.address)).unwrap();
        let endpoint = endpoint.tls_config(tls).unwrap().connect_timeout(PATIENCE);
        let channel = endpoint.connect().await.map_err(|error| Status::from_error(error.into()))?;
        let mut storage = StorageAgentClient::new(channel);
        // TLS 1.3 tells a client that it is refused only after its own end of the handshake. Whoever is let in hears of a role,
        // or of the pools.
        match storage.list_pools(wire::ListPoolsRequest {}).await {
            Err(status) if reason(&status) != "WRONG_ROLE" => Err(status),
            _ => Ok(storage),
        }
    }

    /// A client on the Unix socket.
    pub(crate) async fn local(&self) -> Storage {
        let target = format!("unix://{}", self.socket().display());
        StorageAgentClient::new(Endpoint::from_shared(target).unwrap().connect().await.unwrap())
    }

    /// Waits for a line of the log that has all these words, and gives the first.
    pub(crate) async fn line(&self, words: &[&str]) -> String {
        let has_all = |line: &&String| words.iter().all(|word| line.contains(word));
        let mut log = self.log.clone();
        let found = timeout(PATIENCE, log.wait_for(|log| log.iter().any(|line| has_all(&line)))).await;
        match found {
            Ok(Ok(log)) => log.iter().find(has_all).unwrap().clone(),
            _ => panic!("no line with {words:?} in:\n{}", self.log.borrow().join("\n")),
        }
    }

    /// Waits until as many lines have all these words. More are too many.
    pub(crate) async fn lines(&self, count: usize, words: &[&str]) {
        let mut log = self.log.clone();
        let seen = timeout(PATIENCE, log.wait_for(|_| self.count(words) >= count)).await.is_ok();
        let found = self.count(words);
        assert!(seen && found == count, "{found} lines with {words:?} in:\n{}", self.log.borrow().join("\n"));
    }

    /// How many lines have all these words, by now.
    pub(crate) fn count(&self, words: &[&str]) -> usize {
        self.log.borrow().iter().filter(|line| words.iter().all(|word| line.contains(word))).count()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

pub(crate) type Storage = StorageAgentClient<Channel>;

fn write_certificates(directory: &Path, authority: &Authority, agent: &Certified) {
    let write = |name: &str, text: &str| {
        let path = directory.join(name);
        // As programs that renew certificates do: never half a file.
        let fresh = path.with_extension("new");
        std::fs::write(&fresh, text).unwrap();
        std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::rename(&fresh, &path).unwrap();
    };
    write("ca.crt", &authority.pem);
    write("agent.crt", &agent.certificate);
    write("agent.key", &agent.key);
}

/// A field of a line of the log.
pub(crate) fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let begin =
        line.find(&format!(" {name}=")).unwrap_or_else(|| panic!("no {name} in {line}")) + name.len() + 2;
    line[begin..].split(' ').next().unwrap()
}

/// The reason of a refusal that is ours, or nothing.
pub(crate) fn reason(status: &Status) -> String {
    use tonic_types::StatusExt;
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}
