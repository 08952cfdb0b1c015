//! What a failed command says: to people on standard error, to scripts as JSON, and as an exit code. Turns a gRPC
//! status of an agent into it. Not here: transport errors (`transport.rs`), and what is done about a failure.

use std::fmt::Write as _;

use serde::Serialize;
use tether_proto::{AttachmentId, ParseError};
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// The exit codes of `tether`. Scripts rely on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Success = 0,
    /// A failure that is none of the others; of `tether doctor`: a warning.
    Other = 1,
    /// `tether doctor` found an error.
    Broken = 2,
    /// No such volume, domain, attachment …
    NotFound = 3,
    /// Refused in the present state.
    Refused = 4,
    /// An agent, or what it needs, cannot be reached.
    Unavailable = 5,
    /// The deadline passed; the outcome may be unknown.
    Deadline = 6,
    /// A certificate or a permission.
    Permission = 7,
    /// No room.
    NoRoom = 8,
    /// Bad usage or config.
    Usage = 64,
    /// Ctrl-C.
    Interrupted = 130,
}

/// What is known of a call that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Certainty {
    /// The agent answered, or no agent was to be asked: what is said is what is.
    Answered,
    /// The call never left this host.
    NotSent,
    /// The call was sent and no answer came: it may have been done, and may still go on.
    Unknown,
}

pub(crate) type Result<T> = std::result::Result<T, Box<Failure>>;

/// A failed command.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    pub(crate) exit: Exit,
    pub(crate) certainty: Certainty,
    /// What was being done, "attach tether/v1 to c2".
    pub(crate) what: Option<String>,
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) step: Option<String>,
    pub(crate) command: Option<String>,
    pub(crate) command_exit: Option<i32>,
    /// The running operation that is in the way.
    pub(crate) operation: Option<String>,
    /// What was undone, or could not be undone.
    pub(crate) undo: Option<String>,
    pub(crate) next: Option<String>,
    pub(crate) attachment: Option<AttachmentId>,
    /// The failure of our own undo.
    pub(crate) undo_failure: Option<Box<Failure>>,
}

impl Failure {
    pub(crate) fn new(code: Code, reason: &str, message: impl Into<String>) -> Box<Self> {
        Box::new(Self {
            code,
            exit: exit_of(code),
            certainty: Certainty::Answered,
            what: None,
            reason: reason.to_owned(),
            message: message.into(),
            step: None,
            command: None,
            command_exit: None,
            operation: None,
            undo: None,
            next: None,
            attachment: None,
            undo_failure: None,
        })
    }

    /// Bad usage or config, exit code 64.
    pub(crate) fn usage(reason: &str, message: impl Into<String>) -> Box<Self> {
        Self::new(Code::InvalidArgument, reason, message)
    }

    pub(crate) fn exit(mut self: Box<Self>, exit: Exit) -> Box<Self> {
        self.exit = exit;
        self
    }

    pub(crate) fn next(mut self: Box<Self>, next: impl Into<String>) -> Box<Self> {
        self.next = Some(next.into());
        self
    }

    pub(crate) fn undo(mut self: Box<Self>, undo: impl Into<String>) -> Box<Self> {
        self.undo = Some(undo.into());
        self
    }

    pub(crate) fn attachment(mut self: Box<Self>, id: AttachmentId) -> Box<Self> {
        self.attachment = Some(id);
        self
    }

    /// Says what was being done, unless that is said already.
    pub(crate) fn while_doing(mut self: Box<Self>, what: &str) -> Box<Self> {
        self.what.get_or_insert_with(|| what.to_owned());
        self
    }

    /// The call never left this host.
    pub(crate) fn not_sent(mut self: Box<Self>) -> Box<Self> {
        self.certainty = Certainty::NotSent;
        self
    }

    /// Nobody knows whether it was done.
    pub(crate) fn unknown(mut self: Box<Self>) -> Box<Self> {
        self.certainty = Certainty::Unknown;
        self.exit = Exit::Deadline;
        self
    }

    /// The answer of an agent. A status without our `ErrorInfo` may come from the way there and back; codes that can
    /// mean "the connection broke" are then [`Certainty::Unknown`].
    pub(crate) fn from_status(status: &Status) -> Box<Self> {
        let details = status.get_error_details();
        let mut failure = Self::new(status.code(), "UNSPECIFIED", status.message());
        let Some(info) = details.error_info().filter(|info| info.domain == "tether") else {
            let cut = matches!(
                status.code(),
                Code::Unknown | Code::Cancelled | Code::DeadlineExceeded | Code::Internal | Code::Unavailable
            );
            return if cut { failure.unknown() } else { failure };
        };
        let entry = |key: &str| info.metadata.get(key).filter(|text| !text.is_empty()).cloned();
        failure.reason.clone_from(&info.reason);
        failure.step = entry("step");
        failure.command = entry("command");
        failure.command_exit = entry("exit").and_then(|text| text.parse().ok());
        failure.operation = entry("operation");
        failure.undo = entry("undo");
        failure.next = entry("next");
        let delay = details.retry_info().and_then(|retry| retry.retry_delay);
        if let (None, Some(delay)) = (&failure.next, delay) {
            failure.next = Some(format!("the same command may work in {} s", delay.as_secs().max(1)));
        }
        failure
    }

    /// For people: the error and what is known about it, each on a line of its own.
    pub(crate) fn text(&self) -> String {
        let mut text = String::from("error: ");
        if let Some(what) = &self.what {
            text.push_str(what);
            text.push_str(": ");
        }
        text.push_str(&self.message);
        let command = self.command.as_ref().map(|command| match self.command_exit {
            Some(exit) => format!("{command} (exit code {exit})"),
            None => command.clone(),
        });
        let undo_failure = self.undo_failure.as_ref().map(|failure| failure.text());
        for (label, value) in [
            ("step", &self.step),
            ("command", &command),
            ("running", &self.operation),
            ("undo", &self.undo),
            ("undo", &undo_failure),
            ("next", &self.next),
        ] {
            if let Some(value) = value {
                // Writing to a String does not fail.
                let _infallible = write!(text, "\n  {label}: {}", value.replace('\n', "\n    "));
            }
        }
        text
    }

    /// For scripts.
    pub(crate) fn view(&self) -> FailureView<'_> {
        FailureView {
            code: code_word(self.code),
            reason: &self.reason,
            message: match &self.what {
                Some(what) => format!("{what}: {}", self.message),
                None => self.message.clone(),
            },
            step: self.step.as_deref(),
            command: self.command.as_deref(),
            exit: self.command_exit,
            operation: self.operation.as_deref(),
            next: self.next.as_deref(),
            undo: self.undo.as_deref(),
            undo_error: self.undo_failure.as_ref().map(|failure| Box::new(failure.view())),
            outcome_known: self.certainty != Certainty::Unknown,
            attachment_id: self.attachment.map(|id| id.to_string()),
            exit_code: self.exit as u8,
        }
    }
}

impl From<ParseError> for Box<Failure> {
    fn from(error: ParseError) -> Self {
        Failure::usage("INVALID_ARGUMENT", error.to_string())
            .next("correct it; the verb's own --help says what may be given")
    }
}

/// [`Failure`] as JSON. `exit` is the exit code of `command`, `exit_code` that of `tether`.
#[derive(Debug, Serialize)]
pub(crate) struct FailureView<'a> {
    code: &'static str,
    reason: &'a str,
    message: String,
    step: Option<&'a str>,
    command: Option<&'a str>,
    exit: Option<i32>,
    operation: Option<&'a str>,
    next: Option<&'a str>,
    undo: Option<&'a str>,
    undo_error: Option<Box<FailureView<'a>>>,
    outcome_known: bool,
    attachment_id: Option<String>,
    exit_code: u8,
}

fn exit_of(code: Code) -> Exit {
    match code {
        Code::Ok => Exit::Success,
        Code::NotFound => Exit::NotFound,
        Code::FailedPrecondition | Code::AlreadyExists | Code::Aborted => Exit::Refused,
        Code::Unavailable => Exit::Unavailable,
        Code::DeadlineExceeded => Exit::Deadline,
        Code::PermissionDenied | Code::Unauthenticated => Exit::Permission,
        Code::ResourceExhausted => Exit::NoRoom,
        Code::InvalidArgument | Code::OutOfRange => Exit::Usage,
        Code::Cancelled | Code::Unknown | Code::Unimplemented | Code::Internal | Code::DataLoss => {
            Exit::Other
        }
    }
}

fn code_word(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use tonic_types::ErrorDetails;

    fn status(code: Code, metadata: &[(&str, &str)]) -> Status {
        let metadata: HashMap<String, String> =
            metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Status::with_error_details(
            code,
            "it broke",
            ErrorDetails::with_error_info("LOGIN_FAILED", "tether", metadata),
        )
    }

    #[test]
    fn every_code_of_an_agent_has_its_exit_code() {
        for (code, exit) in [
            (Code::NotFound, 3),
            (Code::FailedPrecondition, 4),
            (Code::AlreadyExists, 4),
            (Code::Aborted, 4),
            (Code::Unavailable, 5),
            (Code::DeadlineExceeded, 6),
            (Code::PermissionDenied, 7),
            (Code::ResourceExhausted, 8),
            (Code::InvalidArgument, 64),
            (Code::Internal, 1),
            (Code::DataLoss, 1),
        ] {
            let failure = Failure::from_status(&status(code, &[]));
            assert_eq!((failure.exit as u8, failure.certainty), (exit, Certainty::Answered), "{code:?}");
        }
    }

    #[test]
    fn people_see_step_command_and_next() {
        let status = status(
            Code::Unavailable,
            &[
                ("step", "login"),
                ("command", "/sbin/iscsiadm -m node"),
                ("exit", "8"),
                ("next", "look"),
                ("undo", "x"),
            ],
        );
        let text = Failure::from_status(&status).while_doing("attach p/v to c2").text();
        assert_eq!(
            text,
            "error: attach p/v to c2: it broke\n  step: login\n  command: /sbin/iscsiadm -m node (exit code 8)\n  \
             undo: x\n  next: look"
        );
    }

    #[test]
    fn a_broken_connection_leaves_the_outcome_unknown() {
        let failure = Failure::from_status(&Status::unavailable("broken pipe"));
        assert_eq!((failure.certainty, failure.exit), (Certainty::Unknown, Exit::Deadline));
        assert_eq!(Failure::from_status(&Status::unimplemented("no")).certainty, Certainty::Answered);
    }
}
