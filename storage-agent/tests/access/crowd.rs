//! Strangers who say nothing, or everything, cost nobody else anything: places, time and lines of the log.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tether_proto::wire;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{interval, timeout};
use uuid::Uuid;

use crate::agent::{Agent, Storage};
use crate::pki::Certified;

/// Connections that say nothing.
const SILENT: usize = 1000;
/// Connections that send junk, each again and again.
const LOUD: usize = 100;

/// The middle of each: a call on an open connection that reads, one that changes (with its journal on the disk), and a new
/// connection with its first call.
#[derive(Debug)]
struct Times {
    look: Duration,
    change: Duration,
    connect: Duration,
}

async fn measure(agent: &Agent, client: &Certified, storage: &mut Storage) -> Times {
    let (mut look, mut change, mut connect) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..50 {
        let began = Instant::now();
        storage.list_pools(wire::ListPoolsRequest {}).await.unwrap();
        look.push(began.elapsed());
        let began = Instant::now();
        let request = wire::UnexportRequest { attachment_id: Uuid::new_v4().to_string(), force: false };
        storage.unexport(request).await.unwrap();
        change.push(began.elapsed());
        let began = Instant::now();
        agent.connect(Some(client)).await.expect("an honest client gets in at its first try");
        connect.push(began.elapsed());
    }
    let middle = |mut times: Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    Times { look: middle(look), change: middle(change), connect: middle(connect) }
}

/// Comes again whenever it was thrown out, but not faster than `pace`.
fn stranger(
    agent: &Agent,
    pace: Duration,
    junk: Option<Vec<u8>>,
    going: Arc<AtomicBool>,
    met: Arc<AtomicUsize>,
) {
    let address = agent.address;
    tokio::spawn(async move {
        let mut pace = interval(pace);
        while going.load(Ordering::Relaxed) {
            pace.tick().await;
            let Ok(mut stream) = TcpStream::connect(address).await else { continue };
            met.fetch_add(1, Ordering::Relaxed);
            if let Some(junk) = &junk {
                // The agent may have closed before all was said.
                drop(stream.write_all(junk).await);
            }
            let mut answer = [0; 256];
            while matches!(stream.read(&mut answer).await, Ok(1..)) {}
        }
    });
}

/// From the honest client's own address, which is the worst that strangers can do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_silent_and_a_hundred_loud_strangers_change_nobodys_times() {
    // Before the limit is raised: the agent has what systemd gives it.
    let agent = Agent::start().await;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(8192), hard).unwrap();
    let client = agent.client("controller");
    let mut storage = agent.connect(Some(&client)).await.unwrap();
    measure(&agent, &client, &mut storage).await;
    let alone = measure(&agent, &client, &mut storage).await;

    let going = Arc::new(AtomicBool::new(true));
    let [silent, loud] = [Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0))];
    for _ in 0..SILENT {
        stranger(&agent, Duration::from_secs(10), None, going.clone(), silent.clone());
    }
    for number in 0..LOUD {
        let junk = match number % 3 {
            0 => b"GET / HTTP/1.1\r\n\r\n".repeat(50),
            // Records of TLS handshakes with nonsense in them.
            1 => [&[22, 3, 1, 0x40, 0][..], &[0xaa; 0x4000]].concat(),
            // A ClientHello that says it goes on, and does not.
            _ => vec![22, 3, 1, 0, 200, 1, 0, 0xff, 0xff, 3, 3],
        };
        stranger(&agent, Duration::from_secs(1), Some(junk), going.clone(), loud.clone());
    }
    let met = || silent.load(Ordering::Relaxed) + loud.load(Ordering::Relaxed);
    let all_are_there = async {
        let mut pace = interval(Duration::from_millis(10));
        while silent.load(Ordering::Relaxed) < SILENT || loud.load(Ordering::Relaxed) < LOUD {
            pace.tick().await;
        }
    };
    timeout(Duration::from_secs(60), all_are_there).await.expect("all strangers connect");
    let (strangers, processor) = (met(), agent.processor_time());
    let crowded = measure(&agent, &client, &mut storage).await;
    let (strangers, processor) = (met() - strangers, agent.processor_time() - processor);
    going.store(false, Ordering::Relaxed);

    println!(
        "alone {alone:?}, among {strangers} connections of strangers {crowded:?}, agent on the processor {processor:?}"
    );
    // Both share this machine's processors with the strangers themselves: what is shown is that nobody waits for a
    // stranger's deadline or place, which are seconds.
    let floor = Duration::from_millis(200);
    for (what, alone, crowded) in [
        ("look", alone.look, crowded.look),
        ("change", alone.change, crowded.change),
        ("connect", alone.connect, crowded.connect),
    ] {
        assert!(crowded < alone * 3 + floor, "{what}: {alone:?} alone, {crowded:?} in the crowd");
    }
    // Each address has thirty lines in a minute, and the rest is counted.
    let refused = agent.count(&["audit: refused", "reason="]);
    assert!((1..=90).contains(&refused), "{refused} lines");
    assert_eq!(agent.count(&["accept failed"]), 0);
}

#[tokio::test]
async fn who_says_nothing_is_closed_after_its_time() {
    let agent = Agent::start().await;
    let began = Instant::now();
    let mut silent = TcpStream::connect(agent.address).await.unwrap();
    let closed = timeout(Duration::from_secs(20), silent.read(&mut [0; 16])).await.expect("it is closed");
    drop(closed);
    assert!(began.elapsed() > Duration::from_secs(3), "a slow client has its time: {:?}", began.elapsed());
    agent.line(&["audit: refused", "reason=\"HANDSHAKE_TIMEOUT\""]).await;
}

/// A client that leaks connections takes its own places, and nobody else's.
#[tokio::test]
async fn one_client_has_so_many_connections_and_another_gets_in() {
    let agent = Agent::start().await;
    let greedy = agent.client("controller");
    let mut open = Vec::new();
    for _ in 0..128 {
        open.push(agent.connect(Some(&greedy)).await.unwrap());
    }
    assert!(agent.connect(Some(&greedy)).await.is_err(), "the 129th");
    let line = agent.line(&["audit: refused", "reason=\"TOO_MANY_CONNECTIONS\""]).await;
    assert!(line.contains("who=\"CN=my-controller\""), "{line}");
    agent.connect(Some(&agent.client("reader"))).await.expect("another client gets in");
    agent.local().await.list_pools(wire::ListPoolsRequest {}).await.expect("root gets in");
    // Its places come back.
    open.truncate(64);
    let again = async {
        let mut pace = interval(Duration::from_millis(20));
        while agent.connect(Some(&greedy)).await.is_err() {
            pace.tick().await;
        }
    };
    timeout(Duration::from_secs(20), again).await.expect("it gets in again");
}
