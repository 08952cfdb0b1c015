//! The doctor: checks of a host that change nothing, run side by side, each with a deadline of its own. Here: how checks are
//! run, the answer to `Diagnose`, and what `tether-…-agent doctor` does; in the submodules: what both hosts have checked.
//! Not here: what only one of the two agents knows to check (its own `doctor`), and how findings are shown (`tether_proto::finding`).

pub mod certificates;
pub mod clock;
pub mod lvm;
pub mod modules;
pub mod state;
pub mod systemd;

use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use tether_proto::finding::{table, worst};
use tether_proto::{Finding, ParseError, Severity, wire};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::command::{CommandError, CommandLine};
use crate::config::{ConfigError, Server};
use crate::failure::Failure;
use crate::tcp_probe::{Silence, probe};

/// How long one check may take, with all that it starts.
const DEADLINE: Duration = Duration::from_secs(25);
/// How long an external program of a check may take: less than the check, so that its name is told.
const COMMAND_DEADLINE: Duration = Duration::from_secs(20);
/// How many addresses a caller may have tried.
const MOST_ADDRESSES: usize = 64;
/// How long the agent's own socket may take to answer.
const SOCKET_DEADLINE: Duration = Duration::from_secs(3);

/// One check, ready to run.
pub struct Check {
    name: &'static str,
    work: Pin<Box<dyn Future<Output = Vec<Finding>> + Send>>,
}

impl Check {
    /// A check that waits for others: programs, sockets.
    pub fn new(name: &'static str, work: impl Future<Output = Vec<Finding>> + Send + 'static) -> Self {
        Self { name, work: Box::pin(work) }
    }

    /// A check that reads files, on a thread that may block.
    pub fn reading(name: &'static str, work: impl FnOnce() -> Vec<Finding> + Send + 'static) -> Self {
        Self::new(name, async move {
            match tokio::task::spawn_blocking(work).await {
                Ok(findings) => findings,
                Err(error) => vec![died(name, &error)],
            }
        })
    }
}

/// Runs all checks at once. One that hangs or dies is a finding of its own and holds up no other.
pub async fn run(checks: Vec<Check>) -> Vec<Finding> {
    let mut running = JoinSet::new();
    for Check { name, work } in checks {
        running.spawn(async move {
            // A task of its own: a panic of one check is told under its name.
            let mut task = tokio::spawn(work);
            match timeout(DEADLINE, &mut task).await {
                Ok(Ok(findings)) => findings,
                Ok(Err(error)) => vec![died(name, &error)],
                // It has deadlines of its own, and enters what hangs as stuck.
                Err(_) => {
                    let found = format!("the check did not end in {} s", DEADLINE.as_secs());
                    let why = "something that it asks hangs: what it would have found is not known";
                    vec![Finding::error(name, found, why).mend("journalctl -k -n 50")]
                }
            }
        });
    }
    let mut findings = Vec::new();
    while let Some(ended) = running.join_next().await {
        match ended {
            Ok(more) => findings.extend(more),
            Err(error) => findings.push(died("doctor", &error)),
        }
    }
    findings.sort_by(|one, other| (&one.check, &one.found).cmp(&(&other.check, &other.found)));
    findings
}

fn died(name: &str, error: &tokio::task::JoinError) -> Finding {
    let found = format!("the check died: {error}");
    Finding::error(name, found, "this is a defect of the agent").mend("report it with the agent's log")
}

/// An external program of a check: absolute path, a deadline below the check's.
pub fn program(path: &str) -> CommandLine {
    CommandLine::new(path).deadline(COMMAND_DEADLINE)
}

/// The finding that a program could not be asked.
pub fn not_asked(check: &str, error: &CommandError, why: &str) -> Finding {
    Finding::warning(check, Failure::from_command(crate::failure::Reason::Internal, error).to_string(), why)
        .mend(error.command())
}

/// What an agent adds to its findings in an answer to `Diagnose`.
#[derive(Debug, Default)]
pub struct About {
    /// The initiator name, of a compute host.
    pub initiator_iqn: String,
    /// Where the host is to be reached, of a storage host.
    pub endpoints: Vec<wire::Endpoint>,
}

/// Answers `Diagnose`.
///
/// # Errors
/// `INVALID_ARGUMENT` when an address is none, or there are too many.
pub async fn diagnose(
    request: wire::DiagnoseRequest,
    checks: Vec<Check>,
    about: impl Future<Output = About>,
) -> Result<wire::DiagnoseResponse, Failure> {
    let received_unix_microseconds = clock::now_unix_microseconds();
    if request.reach.len() > MOST_ADDRESSES {
        let problem = format!("must hold at most {MOST_ADDRESSES} addresses");
        return Err(ParseError::new("reach", problem, &request.reach.len().to_string()).into());
    }
    let mut addresses = Vec::new();
    for text in &request.reach {
        let problem = "must be ADDRESS:PORT, as in 192.0.2.1:3260 or [2001:db8::1]:2049";
        addresses.push(text.parse::<SocketAddr>().map_err(|_| ParseError::new("reach", problem, text))?);
    }
    let (findings, reached, about) = tokio::join!(run(checks), reach(&addresses), about);
    let hostname = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    Ok(wire::DiagnoseResponse {
        findings: findings.into_iter().map(Into::into).collect(),
        hostname: hostname.unwrap_or_default(),
        initiator_iqn: about.initiator_iqn,
        endpoints: about.endpoints,
        reached,
        received_unix_microseconds,
        answered_unix_microseconds: clock::now_unix_microseconds(),
    })
}

/// Tries all addresses at once, in their order.
pub async fn reach(addresses: &[SocketAddr]) -> Vec<wire::Reached> {
    let probes: Vec<_> = addresses.iter().map(|address| (*address, tokio::spawn(probe(*address)))).collect();
    let mut reached = Vec::new();
    for (address, probe) in probes {
        let silence = match probe.await {
            Ok(answer) => answer.err(),
            Err(error) => Some(Silence::Other(std::io::Error::other(error))),
        };
        reached.push(wire::Reached {
            address: address.to_string(),
            answered: silence.is_none(),
            refused: matches!(silence, Some(Silence::Refused)),
            problem: silence.map(|silence| silence.to_string()).unwrap_or_default(),
        });
    }
    reached
}

/// What `doctor` on the host itself checks beside the rest: the config, which may be broken, and whether the agent runs.
pub fn of_the_agent(
    name: &'static str,
    config_file: &Path,
    problem: Option<&ConfigError>,
    server: Option<&Server>,
) -> Vec<Check> {
    let finding = config_finding(name, config_file, problem);
    let mut checks = vec![Check::new("config", async move { vec![finding] })];
    if let Some(server) = server {
        let socket = server.socket.clone();
        checks.push(Check::new("agent", async move { vec![agent_finding(name, &socket).await] }));
    }
    checks
}

fn config_finding(name: &str, file: &Path, problem: Option<&ConfigError>) -> Finding {
    let Some(problem) = problem else {
        return Finding::ok("config", format!("{} is good", file.display()));
    };
    let found = match problem {
        // Line, column and what is wrong there, without a drawing of it.
        ConfigError::Parse { source, .. } => {
            let text = source.to_string();
            format!("{problem}: {}: {}", text.lines().next().unwrap_or_default(), source.message())
        }
        ConfigError::Read { source, .. } => format!("{problem}: {source}"),
        ConfigError::Value { .. } | ConfigError::File { .. } => problem.to_string(),
    };
    let why = "the agent does not start with it; what the config would say is left out of the other checks";
    Finding::error("config", found, why)
        .mend(format!("correct it, until this is content: {name} --check-config --config {}", file.display()))
}

async fn agent_finding(name: &str, socket: &Path) -> Finding {
    let problem = match timeout(SOCKET_DEADLINE, UnixStream::connect(socket)).await {
        Ok(Ok(_)) => return Finding::ok("agent", format!("it answers at {}", socket.display())),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            let found = format!("{}: {error}", socket.display());
            let why = "only root may ask it, so it is not known whether it runs";
            return Finding::note("agent", found, why).mend(format!("sudo {name} doctor"));
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer in {} s", SOCKET_DEADLINE.as_secs()),
    };
    let why = "nothing can be attached or detached; what is connected stays connected";
    Finding::error("agent", format!("it does not run: {}: {problem}", socket.display()), why)
        .mend(format!("systemctl enable --now {name} || journalctl -n 20 -u {name}"))
}

#[derive(Serialize)]
struct Report<'a> {
    severity: Severity,
    findings: &'a [Finding],
}

/// All findings as a person or, when `json`, a script reads them, and the exit code.
pub fn report(findings: &[Finding], json: bool) -> (String, u8) {
    let severity = worst(findings.iter().map(|finding| finding.severity));
    let text = match json {
        // Texts and words are always JSON.
        true => serde_json::to_string(&Report { severity, findings }).unwrap_or_default(),
        false => table(findings.iter().map(|finding| ("", finding))),
    };
    (text, severity.exit_code())
}

/// How long ago that was; nothing for the future.
pub fn age(then: SystemTime) -> Duration {
    SystemTime::now().duration_since(then).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_check_that_hangs_or_dies_is_a_finding_and_holds_up_no_other() {
        let checks = vec![
            Check::new("hangs", std::future::pending()),
            Check::reading("dies", || panic!("no")),
            Check::new("dies-too", async { panic!("no") }),
            Check::reading("works", || vec![Finding::ok("works", "yes")]),
        ];
        let found = run(checks).await;
        let seen: Vec<_> = found.iter().map(|f| (f.check.as_str(), f.severity.as_str())).collect();
        assert_eq!(seen, [("dies", "error"), ("dies-too", "error"), ("hangs", "error"), ("works", "ok")]);
        assert!(found[2].found.contains("did not end"), "{found:?}");
    }

    #[tokio::test]
    async fn the_answer_tells_what_was_reached_and_refuses_nonsense() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let living = listener.local_addr().unwrap().to_string();
        let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dead = closed.local_addr().unwrap().to_string();
        drop(closed);
        let ask = |reach: Vec<String>| {
            diagnose(wire::DiagnoseRequest { reach }, Vec::new(), async { About::default() })
        };
        let answer = ask(vec![dead.clone(), living.clone()]).await.unwrap();
        let seen: Vec<_> =
            answer.reached.iter().map(|r| (r.address.as_str(), r.answered, r.refused)).collect();
        assert_eq!(seen, [(dead.as_str(), false, true), (living.as_str(), true, false)]);
        assert!(answer.received_unix_microseconds <= answer.answered_unix_microseconds);
        assert!(ask(vec!["storage1:3260".into()]).await.is_err());
        assert!(ask(vec![living; 65]).await.is_err());
    }

    #[tokio::test]
    async fn an_agent_that_does_not_run_is_told_with_how_to_start_it() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let finding = agent_finding("tether-x-agent", &socket).await;
        assert_eq!(finding.severity, Severity::Error);
        assert!(finding.mend.starts_with("systemctl enable --now tether-x-agent"), "{finding:?}");
        let _listener = tokio::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(agent_finding("tether-x-agent", &socket).await.severity, Severity::Ok);
    }

    #[test]
    fn a_broken_config_is_a_finding_with_line_and_column() {
        let source = toml::from_str::<toml::Table>("a = 1\nb = ").unwrap_err();
        let error = ConfigError::Parse { path: "/etc/x.toml".into(), source };
        let finding = config_finding("tether-x-agent", Path::new("/etc/x.toml"), Some(&error));
        assert!(finding.found.contains("line 2") && finding.mend.contains("--check-config"), "{finding:?}");
        let (json, code) = report(&[finding], true);
        assert!(json.starts_with("{\"severity\":\"error\",\"findings\":[{\"check\":\"config\""), "{json}");
        assert_eq!(code, 2);
    }
}
