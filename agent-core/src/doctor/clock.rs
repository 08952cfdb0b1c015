//! This host's clock: is it kept right by somebody? Certificates and the order of logs stand on it. Not here: clocks of several
//! hosts against each other, which only a controller sees.

use std::time::{SystemTime, UNIX_EPOCH};

use tether_proto::Finding;

use super::{Check, not_asked, program};

const CHECK: &str = "clock";
const WHY: &str = "certificates are valid by the clock, and logs of two hosts are put in order by it";

/// Now, in microseconds since 1970-01-01 UTC.
pub fn now_unix_microseconds() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// Is the clock synchronised?
pub fn check() -> Check {
    Check::new(CHECK, async {
        let asked = program("/usr/bin/timedatectl")
            .args(["show", "--property=CanNTP", "--property=NTP", "--property=NTPSynchronized"])
            .run()
            .await;
        vec![match asked {
            Ok(output) => judge(&output.stdout),
            Err(error) => not_asked(CHECK, &error, WHY),
        }]
    })
}

/// Judges `timedatectl show`.
fn judge(text: &str) -> Finding {
    let is = |line: &str| text.lines().any(|found| found.trim() == line);
    if is("NTPSynchronized=yes") {
        return Finding::ok(CHECK, "synchronised");
    }
    let mend = match () {
        () if is("NTP=yes") => "timedatectl timesync-status || chronyc sources",
        () if is("CanNTP=yes") => "timedatectl set-ntp true",
        () => "apt-get install chrony",
    };
    Finding::warning(CHECK, "nobody keeps it synchronised", WHY).mend(mend)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tether_proto::Severity;

    #[test]
    fn an_unsynchronised_clock_is_a_warning_with_what_is_missing() {
        assert_eq!(judge("CanNTP=yes\nNTP=yes\nNTPSynchronized=yes\n").severity, Severity::Ok);
        for (text, mend) in [
            ("CanNTP=no\nNTP=no\nNTPSynchronized=no\n", "apt-get install chrony"),
            ("CanNTP=yes\nNTP=no\nNTPSynchronized=no\n", "timedatectl set-ntp true"),
            ("CanNTP=yes\nNTP=yes\nNTPSynchronized=no\n", "timedatectl timesync-status || chronyc sources"),
        ] {
            let finding = judge(text);
            assert_eq!((finding.severity, finding.mend.as_str()), (Severity::Warning, mend));
        }
    }
}
