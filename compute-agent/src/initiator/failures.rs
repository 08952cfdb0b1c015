//! What the initiator's errors mean to a caller.

use tether_agent_core::command::CommandError;
use tether_agent_core::failure::{Failure, Reason};

use super::device::DeviceError;
use super::iscsi::IscsiError;
use super::node_record::NodeRecordError;

/// What is wrong with the device: another volume, or a disk that cannot be used.
pub(crate) fn wrong_device(error: DeviceError) -> Failure {
    match &error {
        DeviceError::Wwn { .. } | DeviceError::Size { .. } => {
            Failure::from_error(Reason::WrongDevice, &error)
        }
        DeviceError::Io { .. } => Failure::from_error(Reason::DeviceMissing, &error),
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        wrong_device(error)
    }
}

impl From<NodeRecordError> for Failure {
    fn from(error: NodeRecordError) -> Self {
        Failure::from_error(Reason::InitiatorFailed, &error)
    }
}

impl From<IscsiError> for Failure {
    fn from(error: IscsiError) -> Self {
        let with_command = |reason, source: &CommandError| {
            let mut failure = Failure::from_error(reason, &error);
            failure.command = Some(source.command().to_owned());
            failure.exit = source.exit_code();
            failure
        };
        match &error {
            IscsiError::Unreachable { .. } => Failure::from_error(Reason::PortalUnreachable, &error),
            IscsiError::Rejected { .. } => Failure::from_error(Reason::ChapRejected, &error),
            IscsiError::SessionExists { .. } => Failure::from_error(Reason::NotOurs, &error),
            IscsiError::Login { source, .. } => with_command(Reason::LoginFailed, source),
            // iscsid may still be at it, and a session may come that nobody waits for.
            IscsiError::Command(source @ CommandError::Deadline { .. }) => {
                with_command(Reason::OutcomeUnknown, source)
            }
            IscsiError::Logout { source, .. } | IscsiError::Command(source) => {
                with_command(Reason::InitiatorFailed, source)
            }
        }
    }
}
