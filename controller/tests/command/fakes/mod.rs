//! Two hosts in this process: stateful fakes of both agents, each over TLS behind a link that can be cut, and the
//! `tether` command run against them with certificates that `tether pki` made.

mod compute;
mod link;
mod storage;

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tether_controller::{Console, Environment};
use tether_proto::wire;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Code, Response, Status};
use tonic_types::{ErrorDetails, StatusExt};

pub(crate) use compute::FakeComputeAgent;
pub(crate) use link::Link;
pub(crate) use storage::FakeStorageAgent;

/// What goes wrong at the next call of a verb.
#[derive(Debug, Clone)]
pub(crate) enum Trouble {
    /// It is refused, and nothing was done.
    Refuse(Status),
    /// It is done, and the connection breaks before the answer.
    CutAfterwards,
    /// The connection breaks, and nothing was done.
    CutBefore,
    /// It is done, and the link is down for good before the answer.
    DownAfterwards,
    /// No answer ever comes.
    Hold,
}

type Watcher = mpsc::Sender<Result<wire::StepEvent, Status>>;

pub(crate) type EventStream = Pin<Box<dyn Stream<Item = Result<wire::Event, Status>> + Send>>;
type EventReply = Result<Response<EventStream>, Status>;

/// What both fakes have.
pub(crate) struct Agent {
    pub(crate) link: Link,
    calls: Arc<Mutex<Vec<String>>>,
    troubles: Mutex<HashMap<String, VecDeque<Trouble>>>,
    watchers: Mutex<HashMap<String, Vec<Watcher>>>,
    /// A call that is held got here.
    pub(crate) held: Notify,
    pub(crate) watch_is_broken: std::sync::atomic::AtomicBool,
    /// What each who watches is told, one after the other; after the last one the stream stays open, after others it ends.
    pub(crate) events: Mutex<VecDeque<Vec<wire::Event>>>,
}

impl Agent {
    fn new(link: Link, calls: Arc<Mutex<Vec<String>>>) -> Self {
        Self {
            link,
            calls,
            troubles: Mutex::default(),
            watchers: Mutex::default(),
            held: Notify::new(),
            watch_is_broken: false.into(),
            events: Mutex::default(),
        }
    }

    pub(crate) fn trouble(&self, verb: &str, trouble: Trouble) {
        lock(&self.troubles).entry(verb.to_owned()).or_default().push_back(trouble);
    }

    /// Notes the call, and fails it as planned. What is to be done when the work is done comes back.
    async fn begin(&self, verb: &str) -> Result<Option<Trouble>, Status> {
        lock(&self.calls).push(verb.to_owned());
        let trouble = lock(&self.troubles).get_mut(verb).and_then(VecDeque::pop_front);
        match trouble {
            Some(Trouble::Refuse(status)) => Err(status),
            Some(Trouble::CutBefore) => {
                self.link.cut();
                std::future::pending().await
            }
            Some(Trouble::Hold) => {
                self.held.notify_one();
                std::future::pending().await
            }
            other => Ok(other),
        }
    }

    async fn end(&self, trouble: Option<Trouble>) {
        match trouble {
            Some(Trouble::CutAfterwards) => self.link.cut(),
            Some(Trouble::DownAfterwards) => self.link.down(),
            _ => return,
        }
        std::future::pending().await
    }

    /// Tells whoever watches of an operation's steps, and gives its report.
    async fn steps(&self, key: &str, outcome: wire::Outcome, steps: &[&str]) -> wire::OperationReport {
        let watchers = lock(&self.watchers).remove(key).unwrap_or_default();
        let mut timings = Vec::new();
        for (number, step) in (0u64..).zip(steps) {
            let start = number * 4000;
            for (state, at) in [(wire::StepState::Started, start), (wire::StepState::Done, start + 3100)] {
                for watcher in &watchers {
                    let event = wire::StepEvent {
                        step: (*step).to_owned(),
                        state: state.into(),
                        at_microseconds: at,
                        progress: String::new(),
                    };
                    drop(watcher.send(Ok(event)).await);
                }
            }
            timings.push(wire::StepTiming {
                step: (*step).to_owned(),
                start_microseconds: start,
                duration_microseconds: 3100,
            });
        }
        let total_microseconds = 4000 * steps.len() as u64;
        wire::OperationReport { outcome: outcome.into(), steps: timings, total_microseconds }
    }

    async fn watch_events(&self) -> EventReply {
        self.begin("Watch").await?;
        let (events, last) = {
            let mut scripts = lock(&self.events);
            (scripts.pop_front().unwrap_or_default(), scripts.is_empty())
        };
        let told = tokio_stream::iter(events.into_iter().map(Ok));
        Ok(Response::new(match last {
            true => Box::pin(told.chain(tokio_stream::pending())),
            false => Box::pin(told),
        }))
    }

    fn watch(
        &self,
        request: wire::WatchOperationRequest,
    ) -> Result<tokio_stream::wrappers::ReceiverStream<Result<wire::StepEvent, Status>>, Status> {
        use wire::watch_operation_request::Key;
        if self.watch_is_broken.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(Status::unimplemented("no watch today"));
        }
        let key = match request.key {
            Some(Key::AttachmentId(id)) => id,
            Some(Key::Volume(volume)) => format!("{}/{}", volume.pool, volume.volume),
            None => return Err(Status::invalid_argument("no key")),
        };
        let (sender, receiver) = mpsc::channel(64);
        lock(&self.watchers).entry(key).or_default().push(sender);
        Ok(tokio_stream::wrappers::ReceiverStream::new(receiver))
    }
}

/// A refusal as the agents send it.
pub(crate) fn refusal(code: Code, reason: &str, message: &str, metadata: &[(&str, &str)]) -> Status {
    let metadata: HashMap<String, String> =
        metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Status::with_error_details(code, message, ErrorDetails::with_error_info(reason, "tether", metadata))
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

/// What a command printed, and its exit code.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) exit: u8,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Shared {
    fn text(&self) -> String {
        String::from_utf8(lock(&self.0).clone()).unwrap()
    }
}

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs the command.
pub(crate) async fn tether(arguments: &[&str], interrupt: impl Future<Output = ()>) -> Ran {
    let (out, err) = (Shared::default(), Shared::default());
    let arguments = ["tether"].iter().chain(arguments).map(OsString::from).collect();
    let console = Console::new(out.clone(), err.clone());
    let exit = tether_controller::run(arguments, &Environment::default(), console, interrupt).await;
    Ran { exit: exit as u8, out: out.text(), err: err.text() }
}

/// A storage host, a compute host, and a controller with its config.
pub(crate) struct Lab {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) storage: Arc<FakeStorageAgent>,
    pub(crate) compute: Arc<FakeComputeAgent>,
    calls: Arc<Mutex<Vec<String>>>,
}

impl Lab {
    pub(crate) async fn up() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let pki = directory.path().join("pki");
        make_pki(&pki).await;
        let calls = Arc::<Mutex<Vec<String>>>::default();
        let (storage_listener, storage_link) = link::listen().await;
        let storage = Arc::new(FakeStorageAgent::new(Agent::new(storage_link, calls.clone())));
        let (compute_listener, compute_link) = link::listen().await;
        let compute =
            Arc::new(FakeComputeAgent::new(Agent::new(compute_link, calls.clone()), storage.clone()));
        let service = wire::storage_agent_server::StorageAgentServer::from_arc(storage.clone());
        let server = tls_server(&pki, "storage1").add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(storage_listener)));
        let service = wire::compute_agent_server::ComputeAgentServer::from_arc(compute.clone());
        let server = tls_server(&pki, "compute1").add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(compute_listener)));
        let lab = Self { directory, storage, compute, calls };
        lab.configure("");
        lab
    }

    /// Writes the config anew, with more sections.
    pub(crate) fn configure(&self, more: &str) {
        let (storage, compute) = (self.storage.agent.link.address, self.compute.agent.link.address);
        let text = format!(
            "[tls]\nca = \"pki/ca.crt\"\ncertificate = \"pki/controller.crt\"\nkey = \"pki/controller.key\"\n\
             [storage.storage1]\naddress = \"{storage}\"\n[compute.compute1]\naddress = \"{compute}\"\n{more}"
        );
        std::fs::write(self.config(), text).unwrap();
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.directory.path().join("tether.toml")
    }

    pub(crate) async fn tether(&self, arguments: &[&str]) -> Ran {
        self.tether_until(arguments, std::future::pending()).await
    }

    pub(crate) async fn tether_until(&self, arguments: &[&str], interrupt: impl Future<Output = ()>) -> Ran {
        let config = self.config();
        let mut all = vec!["--config", config.to_str().unwrap()];
        all.extend(arguments);
        tether(&all, interrupt).await
    }

    /// Runs a command until it has printed all of this, or for 30 seconds.
    pub(crate) async fn tether_until_said(&self, arguments: &[&str], said: &[&str]) -> Ran {
        let (out, err) = (Shared::default(), Shared::default());
        let config = self.config();
        let all =
            ["tether", "--config", config.to_str().unwrap()].into_iter().chain(arguments.iter().copied());
        let console = Console::new(out.clone(), err.clone());
        let interrupt = async {
            let mut pace = tokio::time::interval(Duration::from_millis(20));
            let all_said = async {
                while !said.iter().all(|text| (out.text() + &err.text()).contains(text)) {
                    pace.tick().await;
                }
            };
            drop(tokio::time::timeout(Duration::from_secs(30), all_said).await);
        };
        let all = all.map(OsString::from).collect();
        let exit = tether_controller::run(all, &Environment::default(), console, interrupt).await;
        Ran { exit: exit as u8, out: out.text(), err: err.text() }
    }

    /// The calls that changed something, or tried to, since the last time.
    pub(crate) fn mutations(&self) -> Vec<String> {
        let calls: Vec<String> = lock(&self.calls).drain(..).collect();
        calls.into_iter().filter(|call| !call.starts_with("Get") && !call.starts_with("List")).collect()
    }
}

pub(crate) async fn make_pki(directory: &Path) {
    let directory = directory.to_str().unwrap();
    for arguments in [
        vec!["pki", "init"],
        vec!["pki", "issue", "agent", "storage1", "--address", "127.0.0.1"],
        vec!["pki", "issue", "agent", "compute1"],
        vec!["pki", "issue", "controller", "controller"],
    ] {
        let ran = tether(&[arguments, vec!["--directory", directory]].concat(), std::future::pending()).await;
        assert_eq!(ran.exit, 0, "{ran:?}");
    }
}

/// A server that wants client certificates of the authority.
pub(crate) fn tls_server(pki: &Path, name: &str) -> Server {
    let read = |file: String| std::fs::read(pki.join(file)).unwrap();
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(read(format!("{name}.crt")), read(format!("{name}.key"))))
        .client_ca_root(Certificate::from_pem(read("ca.crt".into())));
    Server::builder().tls_config(tls).unwrap()
}

/// An address at which nobody listens.
pub(crate) async fn nobody() -> String {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string()
}

/// What a forced end tells.
fn lost(force: bool, sentence: &str) -> Vec<String> {
    if force { vec![sentence.to_owned()] } else { Vec::new() }
}

fn object(kind: &str, name: &str, ownership: wire::Ownership) -> wire::HostObject {
    wire::HostObject {
        kind: kind.into(),
        name: name.into(),
        ownership: ownership.into(),
        attachment_ids: Vec::new(),
        reason: format!("because it is {}", ownership.as_str_name()),
    }
}

/// The planned diagnosis, by a clock that is right.
fn diagnosis(planned: &Mutex<wire::DiagnoseResponse>) -> wire::DiagnoseResponse {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros() as i64;
    let mut diagnosis = lock(planned).clone();
    diagnosis.received_unix_microseconds += now;
    diagnosis.answered_unix_microseconds += now;
    diagnosis
}
