//! What the kernel and udev tell on netlink: a device came or went, and udev is done with it and has made its names. So
//! that whoever waits for a device waits for an event (rule: no sleeps). Not here: what is waited for.
//!
//! One thread waits at the netlink socket for as long as the agent runs; waiters subscribe.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, setsockopt, socket, sockopt,
};
use tokio::sync::broadcast;
use tokio::time::{Instant, timeout_at};

/// The multicast groups of uevents, as bits: the kernel's own, and the one where udev tells what it is done with
/// (libudev's `udev_monitor_new_from_netlink`).
const GROUPS: u32 = 0b01 | 0b10;
/// What udev's messages begin with.
const UDEV_PREFIX: &[u8] = b"libudev\0";
/// Room for a burst of events, in bytes: one is at most 2 KiB (UEVENT_BUFFER_SIZE).
const RECEIVE_BUFFER: usize = 1024 * 1024;
/// How many events a slow waiter may lag behind before it looks for itself.
const BACKLOG: usize = 1024;

/// Something happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KernelEvent {
    /// A uevent of the kernel.
    Device {
        /// `add`, `remove`, `change` …
        action: String,
        /// The path under `/sys`.
        path: String,
        /// `block`, `iscsi_session` …
        subsystem: String,
    },
    /// udev is done with some device. Anybody can send this, so it is a reason to look and nothing more.
    Udev,
}

/// Hands out what happens to all who subscribe.
#[derive(Debug, Clone)]
pub(crate) struct KernelEvents {
    sender: broadcast::Sender<KernelEvent>,
}

impl KernelEvents {
    /// Opens the socket and starts its thread.
    pub(crate) fn open() -> io::Result<Self> {
        let (sender, _) = broadcast::channel(BACKLOG);
        let netlink = open_netlink()?;
        let told = sender.clone();
        std::thread::Builder::new().name("kernel-events".into()).spawn(move || {
            if let Err(error) = read(&netlink, &told) {
                tracing::error!(%error, "the kernel's events cannot be read any more; waits end by their deadlines");
            }
        })?;
        Ok(Self { sender })
    }

    /// What happens from now on.
    pub(crate) fn subscribe(&self) -> Subscription {
        Subscription { receiver: self.sender.subscribe() }
    }
}

/// What has happened since the subscription.
pub(crate) struct Subscription {
    receiver: broadcast::Receiver<KernelEvent>,
}

impl Subscription {
    /// Looks, and looks again at every event, until `look` finds something or the deadline passes (`None`).
    pub(crate) async fn wait_until<T>(
        &mut self,
        within: Duration,
        mut look: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(found) = look() {
                return Some(found);
            }
            match timeout_at(deadline, self.receiver.recv()).await {
                // Events that were missed are a reason to look, too.
                Ok(Ok(_) | Err(broadcast::error::RecvError::Lagged(_))) => {}
                Ok(Err(broadcast::error::RecvError::Closed)) | Err(_) => return look(),
            }
        }
    }

    /// The paths of the devices of a subsystem that came since the subscription; `None` when events were missed.
    pub(crate) fn added(&mut self, wanted: &str) -> Option<Vec<String>> {
        let mut paths = Vec::new();
        loop {
            match self.receiver.try_recv() {
                Ok(KernelEvent::Device { action, path, subsystem })
                    if action == "add" && subsystem == wanted =>
                {
                    paths.push(path);
                }
                Ok(_) => {}
                Err(broadcast::error::TryRecvError::Lagged(_)) => return None,
                Err(_) => return Some(paths),
            }
        }
    }
}

fn open_netlink() -> io::Result<OwnedFd> {
    let descriptor = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    setsockopt(&descriptor, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
    bind(descriptor.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
    Ok(descriptor)
}

/// Reads until the socket fails for good.
fn read(netlink: &OwnedFd, sender: &broadcast::Sender<KernelEvent>) -> io::Result<()> {
    let mut buffer = vec![0u8; 16 * 1024];
    loop {
        let event = match recvfrom::<NetlinkAddr>(netlink.as_raw_fd(), &mut buffer) {
            Ok((length, _)) if buffer[..length].starts_with(UDEV_PREFIX) => Some(KernelEvent::Udev),
            // Only the kernel has port 0; anybody may send to the group with another one.
            Ok((length, Some(from))) if from.pid() == 0 => parse(&buffer[..length]),
            Ok(_) | Err(nix::Error::EINTR) => None,
            // The kernel dropped some: whoever waits is to look for itself.
            Err(nix::Error::ENOBUFS) => Some(KernelEvent::Udev),
            Err(error) => return Err(error.into()),
        };
        if let Some(event) = event {
            // Nobody may be waiting.
            drop(sender.send(event));
        }
    }
}

/// A uevent: `ACTION@PATH`, then `KEY=VALUE`, each ended by a NUL (the kernel's lib/kobject_uevent.c).
fn parse(message: &[u8]) -> Option<KernelEvent> {
    let text = std::str::from_utf8(message).ok()?;
    let value = |key: &str| {
        text.split('\0').find_map(|field| field.strip_prefix(key)?.strip_prefix('=')).map(str::to_owned)
    };
    Some(KernelEvent::Device {
        action: value("ACTION")?,
        path: value("DEVPATH")?,
        subsystem: value("SUBSYSTEM")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_message_of_the_kernel_is_too_strange(message: Vec<u8>, path in "[!-~]{1,40}") {
            drop(parse(&message));
            let good = format!("add@{path}\0ACTION=add\0DEVPATH={path}\0SUBSYSTEM=block\0");
            let wanted = KernelEvent::Device { action: "add".into(), path, subsystem: "block".into() };
            prop_assert_eq!(parse(good.as_bytes()), Some(wanted));
        }
    }

    #[test]
    fn a_uevent_is_understood_and_junk_is_not() {
        let message = b"add@/devices/x\0ACTION=add\0DEVPATH=/devices/x\0SUBSYSTEM=block\0DEVNAME=sda\0";
        let wanted = KernelEvent::Device {
            action: "add".into(),
            path: "/devices/x".into(),
            subsystem: "block".into(),
        };
        assert_eq!(parse(message), Some(wanted));
        for junk in [&b""[..], b"libudev\0\xfe\xed\xca\xfe", b"add@/devices/x\0", &[0xff; 30]] {
            assert_eq!(parse(junk), None);
        }
    }

    #[tokio::test]
    async fn a_waiter_looks_again_at_each_event_and_gives_up_in_time() {
        let (sender, receiver) = broadcast::channel(8);
        let mut subscription = Subscription { receiver };
        let mut looks = 0;
        sender.send(KernelEvent::Udev).unwrap();
        let found = subscription
            .wait_until(Duration::from_secs(5), || {
                looks += 1;
                (looks == 2).then_some(7)
            })
            .await;
        assert_eq!(found, Some(7));
        assert_eq!(subscription.wait_until(Duration::from_millis(10), || None::<u8>).await, None);
    }
}
