//! From an error to what a caller sees. The one table from reason to gRPC code, retry and next step.
//!
//! Adapters have small error enums of their own and turn them into a [`Failure`] with a [`Reason`]. Nothing here
//! knows how an error came about.

use std::collections::HashMap;
use std::time::Duration;

use tether_proto::ParseError;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::command::CommandError;
use crate::journal::JournalError;

/// The `domain` of every `google.rpc.ErrorInfo`.
pub const ERROR_DOMAIN: &str = "tether";

macro_rules! reasons {
    ($(#[doc = $doc:literal] $name:ident = $text:literal, $code:ident, retry $retry:expr, $next:literal;)+) => {
        /// Why an operation failed, in words an operator understands.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Reason { $(#[doc = $doc] $name),+ }

        impl Reason {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// What it means, a sentence.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$name => $doc.trim_ascii()),+ }
            }

            /// The word on the wire, `google.rpc.ErrorInfo.reason`.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text),+ }
            }

            /// The gRPC status code.
            pub fn code(self) -> Code {
                match self { $(Self::$name => Code::$code),+ }
            }

            /// After how many seconds the same call may succeed with nobody doing anything.
            pub fn retry_after(self) -> Option<u64> {
                match self { $(Self::$name => $retry),+ }
            }

            /// What to do, when the failure itself does not know better.
            pub fn next(self) -> &'static str {
                match self { $(Self::$name => $next),+ }
            }
        }
    };
}

reasons! {
    /// A value in the request is not legal.
    InvalidArgument = "INVALID_ARGUMENT", InvalidArgument, retry None, "correct the value and call again";
    /// The caller has not the role that the RPC needs.
    WrongRole = "WRONG_ROLE", PermissionDenied, retry None, "call with a certificate of that role";
    /// No pool of that name is in the config.
    PoolNotFound = "POOL_NOT_FOUND", NotFound, retry None, "name a pool from the storage agent's config";
    /// No such volume.
    VolumeNotFound = "VOLUME_NOT_FOUND", NotFound, retry None, "list the volumes, or create it";
    /// No such export.
    ExportNotFound = "EXPORT_NOT_FOUND", NotFound, retry None, "list the exports";
    /// No such attachment.
    AttachmentNotFound = "ATTACHMENT_NOT_FOUND", NotFound, retry None, "list the attachments";
    /// libvirt knows no such domain.
    DomainNotFound = "DOMAIN_NOT_FOUND", NotFound, retry None, "see the domains with: virsh list --all";
    /// The same name or id was used before with other parameters.
    DifferentParameters = "DIFFERENT_PARAMETERS", AlreadyExists, retry None, "use a new id or name, or repeat the first call exactly";
    /// The pool has no room.
    PoolFull = "POOL_FULL", ResourceExhausted, retry None, "delete volumes, extend the pool, or ask for less";
    /// The volume is exported.
    VolumeExported = "VOLUME_EXPORTED", FailedPrecondition, retry None, "detach it first";
    /// Something on the storage host has the volume open.
    VolumeInUse = "VOLUME_IN_USE", FailedPrecondition, retry None, "see what holds it on the storage host: lsblk, dmsetup info, fuser";
    /// Somebody else made it, and we do not touch it.
    NotOurs = "NOT_OURS", FailedPrecondition, retry None, "use the tool that made it";
    /// The attachment id was detached or unexported before.
    AttachmentEnded = "ATTACHMENT_ENDED", FailedPrecondition, retry None, "attach again with a new attachment id";
    /// Another operation on the same key runs.
    OperationRunning = "OPERATION_RUNNING", Aborted, retry Some(2), "wait until it ends, then call again";
    /// The kernel cannot export iSCSI targets.
    KernelLacksTarget = "KERNEL_LACKS_TARGET", FailedPrecondition, retry None, "load the modules: modprobe -a target_core_iblock iscsi_target_mod";
    /// The kernel's target refused a write or holds another value than was written.
    TargetFailed = "TARGET_FAILED", Internal, retry None, "see the kernel's log on the storage host: journalctl -k";
    /// The kernel cannot listen on a portal.
    PortalUnavailable = "PORTAL_UNAVAILABLE", FailedPrecondition, retry None, "give the storage host that address, or correct [iscsi] portals in its config";
    /// An LVM tool failed.
    LvmFailed = "LVM_FAILED", Internal, retry None, "run the command by hand on the storage host";
    /// A thin pool that hands out old data.
    ThinPoolNotZeroing = "THIN_POOL_NOT_ZEROING", FailedPrecondition, retry None, "turn zeroing on: lvchange --zero y VG/POOL";
    /// New space could not be wiped.
    WipeFailed = "WIPE_FAILED", Internal, retry None, "see the kernel's log on the storage host, then create it again";
    /// The new size is less than the present one.
    ShrinkRefused = "SHRINK_REFUSED", FailedPrecondition, retry None, "ask for more than the volume has: nothing is ever made smaller";
    /// The pool's directory cannot be used as it is.
    PoolUnavailable = "POOL_UNAVAILABLE", FailedPrecondition, retry None, "see on the storage host that the pool's file system is mounted, and writable for root alone";
    /// A file of a pool could not be made, changed or removed.
    FileFailed = "FILE_FAILED", Internal, retry None, "see the pool's directory and the kernel's log on the storage host";
    /// This host does not serve NFS now.
    NfsServerDown = "NFS_SERVER_DOWN", FailedPrecondition, retry None, "on the storage host: systemctl enable --now nfs-server; if it runs already: systemctl restart tether-storage-agent, which was started before nfsd was";
    /// This host's NFS server was just started, and its clients have not told it yet which files they have open.
    NfsServerStarting = "NFS_SERVER_STARTING", Unavailable, retry Some(10), "call again when its grace period is over (nfs.conf, grace-time)";
    /// The directory could not be shared.
    ShareFailed = "SHARE_FAILED", Internal, retry None, "run the command by hand on the storage host";
    /// The connector has no address to which the directory may be shared.
    NoClientAddress = "NO_CLIENT_ADDRESS", FailedPrecondition, retry None, "give the hypervisor an address in [nfs] client_networks of the storage agent's config, or add its network there";
    /// The agent's own record could not be written or read.
    JournalFailed = "JOURNAL_FAILED", Internal, retry None, "see to the disk under the agent's state directory";
    /// The host has no initiator name.
    NoInitiatorName = "NO_INITIATOR_NAME", FailedPrecondition, retry None, "install open-iscsi, or write InitiatorName=iqn... to /etc/iscsi/initiatorname.iscsi";
    /// None of the portals answers.
    PortalUnreachable = "PORTAL_UNREACHABLE", Unavailable, retry Some(5), "see that the storage host is up, and that its portals are not behind a firewall";
    /// The NFS server does not answer.
    ServerUnreachable = "SERVER_UNREACHABLE", Unavailable, retry Some(5), "see that the storage host is up, that nfs-server runs there, and that TCP 2049 is not behind a firewall";
    /// The share could not be mounted.
    MountFailed = "MOUNT_FAILED", Unavailable, retry Some(5), "run the command by hand on the compute host; see that the storage host shares the directory with it: exportfs -v";
    /// Two hosts have one initiator name.
    InitiatorNameTaken = "INITIATOR_NAME_TAKEN", FailedPrecondition, retry None, "give each host a name of its own in /etc/iscsi/initiatorname.iscsi and restart iscsid there; a host that was renamed: detach what it has first";
    /// A running guest cannot be told that its read-only disk is larger.
    ReadOnlyDisk = "READ_ONLY_DISK", FailedPrecondition, retry None, "nothing is lost: the guest sees the new size when its domain was shut off and started, or when the disk is detached and attached anew";
    /// The volume has not the size that the guest is to see.
    NotExtended = "NOT_EXTENDED", FailedPrecondition, retry None, "extend the volume on its storage host first: tether volume extend POOL/NAME SIZE";
    /// The target refused the name or the secret.
    ChapRejected = "CHAP_REJECTED", PermissionDenied, retry None, "export again; see that the initiator name is the one that the connector told";
    /// The login failed for another reason.
    LoginFailed = "LOGIN_FAILED", Unavailable, retry Some(5), "see journalctl -u iscsid on the compute host";
    /// open-iscsi cannot be used.
    InitiatorFailed = "INITIATOR_FAILED", Internal, retry None, "see that open-iscsi is installed and iscsid.socket is active";
    /// The session is there, the device is not.
    DeviceMissing = "DEVICE_MISSING", DeadlineExceeded, retry Some(5), "see the kernel's log on the compute host: journalctl -k";
    /// The device is not the volume.
    WrongDevice = "WRONG_DEVICE", DataLoss, retry None, "do not use it; compare the volume's wwn and size on both hosts, then export again under a new id";
    /// The domain has no room for a disk.
    NoFreeSlot = "NO_FREE_SLOT", ResourceExhausted, retry None, "detach a disk, use another bus, or add a controller to the domain and restart it";
    /// The wished target device is taken.
    TargetDeviceTaken = "TARGET_DEVICE_TAKEN", FailedPrecondition, retry None, "name another target device, or none";
    /// The domain cannot take this kind of disk.
    DomainUnsuitable = "DOMAIN_UNSUITABLE", FailedPrecondition, retry None, "use another bus or another machine type";
    /// The domain must run for this.
    DomainNotRunning = "DOMAIN_NOT_RUNNING", FailedPrecondition, retry None, "start the domain, or attach persistently";
    /// libvirt does not answer.
    HypervisorUnavailable = "HYPERVISOR_UNAVAILABLE", Unavailable, retry Some(5), "see that libvirtd runs: systemctl status libvirtd";
    /// libvirt refused.
    HypervisorRefused = "HYPERVISOR_REFUSED", Internal, retry None, "see journalctl -u libvirtd on the compute host";
    /// The guest keeps the disk.
    GuestHoldsDevice = "GUEST_HOLDS_DEVICE", DeadlineExceeded, retry Some(10), "unmount the disk in the guest, see that its OS runs, then detach again; the storage stays connected";
    /// What the host had cached could not be written.
    FlushFailed = "FLUSH_FAILED", DataLoss, retry None, "mend the path to the storage, then detach again; the storage stays connected";
    /// A domain has the device by other means than ours.
    DeviceInUse = "DEVICE_IN_USE", FailedPrecondition, retry None, "take the disk out of the domain with the tool that put it there, then detach again";
    /// What was to be gone is still there.
    StillThere = "STILL_THERE", Internal, retry Some(5), "call again; if it stays, see the kernel's log";
    /// Others were busy with the domain all the time.
    DomainBusy = "DOMAIN_BUSY", Unavailable, retry Some(5), "call again; see what keeps the domain busy: virsh domjobinfo DOMAIN";
    /// Another attachment of this host has the target or the volume.
    TargetAttached = "TARGET_ATTACHED", FailedPrecondition, retry None, "detach the other attachment first";
    /// It is not known whether it was done.
    OutcomeUnknown = "OUTCOME_UNKNOWN", Unavailable, retry Some(10), "see the attachment's state; detach it, or repeat the call with the same id";
    /// Somebody who watches did not keep up.
    EventsMissed = "EVENTS_MISSED", DataLoss, retry Some(1), "watch again: what holds then is told first";
    /// The kernel does not come back from a call.
    Stuck = "STUCK", DeadlineExceeded, retry None, "see the kernel's log: journalctl -k; what hangs in the kernel ends with it or with a reboot";
    /// A defect of ours.
    Internal = "INTERNAL", Internal, retry None, "report this with the agent's log";
}

/// A failed operation, as its caller is told.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Why.
    pub reason: Reason,
    /// What went wrong, a sentence that names the things concerned.
    pub message: String,
    /// The step that failed.
    pub step: Option<&'static str>,
    /// What to do; the reason's own advice when empty.
    pub next: Option<String>,
    /// The program that failed.
    pub command: Option<String>,
    /// Its exit code.
    pub exit: Option<i32>,
    /// What could not be undone.
    pub undo: Vec<String>,
    /// The process that is still there: the step that it belongs to keeps its key `STUCK` until it ends.
    pub process: Option<u32>,
}

impl Failure {
    /// A failure with the reason's own advice.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            step: None,
            next: None,
            command: None,
            exit: None,
            undo: Vec::new(),
            process: None,
        }
    }

    /// A failure from an error and all of its sources, `a: b: c`.
    pub fn from_error(reason: Reason, error: &dyn std::error::Error) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            message.push_str(": ");
            message.push_str(&error.to_string());
            source = error.source();
        }
        Self::new(reason, message)
    }

    /// A failure of an external program.
    pub fn from_command(reason: Reason, error: &CommandError) -> Self {
        let mut failure = Self::from_error(reason, error);
        failure.command = Some(error.command().to_owned());
        failure.exit = error.exit_code();
        failure
    }

    /// The same of a program that nobody may start again beside itself: one that is still there after its deadline is `STUCK`.
    pub fn from_program(reason: Reason, error: &CommandError) -> Self {
        match error {
            CommandError::Deadline { stuck_pid: Some(pid), .. } => {
                Self { process: Some(*pid), ..Self::from_command(Reason::Stuck, error) }
            }
            _ => Self::from_command(reason, error),
        }
    }

    /// What to do next.
    pub fn advice(&self) -> &str {
        self.next.as_deref().unwrap_or(self.reason.next())
    }

    /// The same with advice that fits better.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }

    /// The same at a step, unless an inner step is named already.
    #[must_use]
    pub fn at(mut self, step: &'static str) -> Self {
        self.step.get_or_insert(step);
        self
    }
}

impl From<ParseError> for Failure {
    fn from(error: ParseError) -> Self {
        Self::new(Reason::InvalidArgument, error.to_string()).at("validate")
    }
}

impl From<JournalError> for Failure {
    fn from(error: JournalError) -> Self {
        Self::from_error(Reason::JournalFailed, &error)
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let reason = failure.reason;
        let mut metadata = HashMap::new();
        metadata.insert("next".to_owned(), failure.next.unwrap_or_else(|| reason.next().to_owned()));
        if let Some(step) = failure.step {
            metadata.insert("step".to_owned(), step.to_owned());
        }
        if let Some(command) = failure.command {
            metadata.insert("command".to_owned(), command);
        }
        if let Some(exit) = failure.exit {
            metadata.insert("exit".to_owned(), exit.to_string());
        }
        if !failure.undo.is_empty() {
            metadata.insert("undo".to_owned(), failure.undo.join("; "));
        }
        let mut details = ErrorDetails::with_error_info(reason.as_str(), ERROR_DOMAIN, metadata);
        if let Some(seconds) = reason.retry_after() {
            details.set_retry_info(Some(Duration::from_secs(seconds)));
        }
        Status::with_error_details(reason.code(), failure.message, details)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// F45: step, command, exit code and next step reach the caller.
    #[test]
    fn f45_a_status_carries_reason_step_command_exit_and_next() {
        let mut failure = Failure::new(Reason::LvmFailed, "cannot create volume fast/a").at("create-volume");
        failure.command = Some("/sbin/lvcreate -n a".into());
        failure.exit = Some(5);
        failure.undo = vec!["removing a failed".into()];
        let status = Status::from(failure.at("outer"));
        assert_eq!(status.code(), Code::Internal);
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("LVM_FAILED", "tether"));
        for (key, value) in [
            ("step", "create-volume"),
            ("command", "/sbin/lvcreate -n a"),
            ("exit", "5"),
            ("undo", "removing a failed"),
            ("next", "run the command by hand on the storage host"),
        ] {
            assert_eq!(info.metadata.get(key).map(String::as_str), Some(value), "{key}");
        }
    }

    #[test]
    fn what_may_pass_by_itself_says_when_to_try_again() {
        let status = Status::from(Failure::new(Reason::PortalUnreachable, "no portal answers"));
        assert!(status.get_error_details().retry_info().is_some());
        let status = Status::from(Failure::new(Reason::WrongDevice, "another size"));
        assert!(status.get_error_details().retry_info().is_none());
    }
}
