//! open-iscsi: the initiator's name, the daemon, and the version. Whether the name is this host's alone (F42), only a
//! controller can say, who knows the other hosts.

use std::collections::BTreeMap;
use std::io;

use tether_agent_core::doctor::systemd::{self, Unit};
use tether_agent_core::doctor::{Check, not_asked, program};
use tether_proto::{Finding, Iqn};

use crate::connector::{INITIATOR_NAME, parse_initiator_name};
use crate::initiator::iscsi::ISCSIADM;

const NAME: &str = "initiator-name";
const DAEMON: &str = "iscsid";
const VERSION: &str = "open-iscsi";
const UNITS: [&str; 2] = ["iscsid.socket", "iscsid.service"];
const WHY: &str = "no volume of a volume group can be attached or detached";
const INSTALL: &str = "apt-get install open-iscsi";

/// The checks of open-iscsi.
pub(super) fn checks() -> Vec<Check> {
    vec![
        Check::reading(NAME, || vec![judge_name(std::fs::read_to_string(INITIATOR_NAME))]),
        Check::new(DAEMON, async {
            vec![match systemd::units(&UNITS).await {
                Ok(units) => judge_daemon(&units),
                Err(error) => not_asked(DAEMON, &error, "it is not known whether iscsid runs"),
            }]
        }),
        Check::new(VERSION, async {
            vec![match program(ISCSIADM).arg("--version").run().await {
                Ok(output) => judge_version(&output.stdout),
                Err(error) => Finding::error(VERSION, error.to_string(), WHY).mend(INSTALL),
            }]
        }),
    ]
}

/// This host's initiator name, if it has a good one.
pub(super) fn name() -> Option<Iqn> {
    parse_initiator_name(&std::fs::read_to_string(INITIATOR_NAME).ok()?).ok()
}

fn judge_name(text: io::Result<String>) -> Finding {
    let problem = match text.map(|text| parse_initiator_name(&text)) {
        Ok(Ok(name)) => return Finding::ok(NAME, name.to_string()),
        Ok(Err(problem)) => problem,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let found = format!("{INITIATOR_NAME}: {error}");
            return Finding::note(NAME, found, "only root may read it")
                .mend("sudo tether-compute-agent doctor");
        }
        Err(error) => error.to_string(),
    };
    Finding::error(NAME, format!("{INITIATOR_NAME}: {problem}"), WHY).mend(
        "echo \"InitiatorName=$(iscsi-iname)\" >/etc/iscsi/initiatorname.iscsi && systemctl try-restart iscsid",
    )
}

fn judge_daemon(units: &BTreeMap<String, Unit>) -> Finding {
    let is = |test: fn(&Unit) -> bool| UNITS.iter().any(|name| units.get(*name).is_some_and(test));
    if !is(|unit| unit.loaded) {
        return Finding::error(DAEMON, "open-iscsi is not installed, or iscsid is masked", WHY).mend(INSTALL);
    }
    if !is(|unit| unit.active) {
        let found = "neither iscsid.socket nor iscsid.service is active";
        return Finding::error(
            DAEMON,
            found,
            format!("{WHY}, and a session that is lost does not come back"),
        )
        .mend("systemctl enable --now iscsid.socket");
    }
    if !is(|unit| unit.enabled) {
        let why = "after a boot of this host sessions are not made again";
        return Finding::warning(DAEMON, "iscsid does not start with the host", why)
            .mend("systemctl enable iscsid.socket");
    }
    Finding::ok(DAEMON, "it runs, or starts when it is needed")
}

/// Judges `iscsiadm --version`.
pub(crate) fn judge_version(text: &str) -> Finding {
    let version = text.split_whitespace().last().unwrap_or_default();
    // With node.session.scan=manual, which attachments use, the login of this one version never returns (F32).
    if version.split('-').next() == Some("2.1.10") {
        let why = "logins of this version hang when the disks are scanned by hand, as the agent does";
        return Finding::error(VERSION, "version 2.1.10", why)
            .mend("apt-get update && apt-get install open-iscsi   # 2.1.11 or later, or 2.1.9");
    }
    Finding::ok(VERSION, format!("version {version}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tether_proto::Severity;

    #[test]
    fn f42_a_host_without_a_good_name_of_its_own_is_told_how_to_get_one() {
        assert_eq!(
            judge_name(Ok("InitiatorName=iqn.1993-08.org.debian:01:ab\n".into())).severity,
            Severity::Ok
        );
        for bad in [Ok(String::new()), Ok("InitiatorName=x\n".into()), Err(io::ErrorKind::NotFound.into())] {
            let finding = judge_name(bad);
            assert_eq!(finding.severity, Severity::Error);
            assert!(finding.mend.contains("iscsi-iname"), "{finding:?}");
        }
        assert_eq!(judge_name(Err(io::ErrorKind::PermissionDenied.into())).severity, Severity::Note);
    }

    #[test]
    fn f32_the_version_whose_logins_hang_is_an_error() {
        // As open-iscsi 2.1.8 of Debian 12 says it.
        assert_eq!(judge_version("iscsiadm version 2.1.8\n").severity, Severity::Ok);
        for trap in ["iscsiadm version 2.1.10\n", "iscsiadm version 2.1.10-1\n"] {
            assert_eq!(judge_version(trap).severity, Severity::Error, "{trap}");
        }
        assert_eq!(judge_version("iscsiadm version 2.1.100\n").severity, Severity::Ok);
    }

    proptest! {
        #[test]
        fn f32_whatever_iscsiadm_says_only_that_version_is_an_error(text in ".{0,40}", revision in "(-[a-z0-9.]{1,9})?") {
            let bad = judge_version(&format!("{text} 2.1.10{revision}\n"));
            prop_assert_eq!(bad.severity, Severity::Error);
            let other = judge_version(&text);
            prop_assert!(other.severity == Severity::Ok || text.contains("2.1.10"));
        }
    }

    #[test]
    fn an_iscsid_that_was_stopped_is_an_error_and_one_that_starts_when_needed_is_not() {
        let unit = |loaded, active, enabled| Unit { loaded, active, enabled };
        let judge = |socket: Unit, service: Unit| {
            let units = [("iscsid.socket".to_owned(), socket), ("iscsid.service".to_owned(), service)];
            judge_daemon(&units.into_iter().collect())
        };
        assert_eq!(judge(unit(true, true, true), unit(true, false, false)).severity, Severity::Ok);
        let stopped = judge(unit(true, false, true), unit(true, false, false));
        assert_eq!(
            (stopped.severity, stopped.mend.as_str()),
            (Severity::Error, "systemctl enable --now iscsid.socket")
        );
        let lost = judge(unit(true, true, false), unit(true, true, false));
        assert_eq!(lost.severity, Severity::Warning);
        assert_eq!(judge_daemon(&BTreeMap::new()).mend, INSTALL);
    }
}
