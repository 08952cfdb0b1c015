//! What is seen of a host that does not answer: its processors, its devices and its console, as its emulator shows them.
//!
//! Not here: what is done then (see `lab`).

use std::time::Duration;

use crate::instance::Instance;
use crate::lab::Lab;
use crate::progress::pause;
use crate::qemu::{MACHINES, Machine};
use crate::qmp::Qmp;

/// A host that was just used answers within this.
const ANSWER: Duration = Duration::from_secs(20);
/// The monitor answers.
const MONITOR: Duration = Duration::from_secs(10);
/// Between two looks at where a processor is.
const BETWEEN: Duration = Duration::from_secs(1);
/// How much of a console is shown.
const CONSOLE_LINES: usize = 40;

/// What there is to see of each host that does not answer; nothing when both do.
pub async fn hosts(lab: &Lab) -> String {
    let mut seen = String::new();
    for (machine, host) in MACHINES.into_iter().zip([&lab.storage, &lab.compute]) {
        if let Err(error) = host.run_within("cat /proc/loadavg", ANSWER).await {
            let shown = describe(lab.instance(), machine).await;
            seen += &format!("the host {} does not answer: {error:#}\n{shown}", host.name);
        }
    }
    seen
}

/// Where a host's processors are, twice, what interrupts wait, and the last lines that its kernel wrote to its console.
pub(crate) async fn describe(instance: &Instance, machine: &Machine) -> String {
    let file = |what: &str| instance.file(&format!("{}.{what}", machine.name));
    let processors = match Qmp::connect(&file("qmp")).await {
        Ok(mut monitor) => ask(&mut monitor).await,
        Err(error) => format!("{error:#}\n"),
    };
    let console = std::fs::read(file("console")).unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    let lines: Vec<_> = console.lines().collect();
    let end = lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n    ");
    format!("{processors}the end of the console of {}:\n    {end}\n", machine.name)
}

async fn ask(monitor: &mut Qmp) -> String {
    let mut shown = String::new();
    for question in ["info status", "info registers -a", "info registers -a", "info lapic", "info irq"] {
        let answer = monitor.ask(question, MONITOR).await.unwrap_or_else(|error| format!("{error:#}"));
        shown += &format!("{question}:\n");
        // Of the registers, those that tell where it is and whether interrupts can reach it.
        let telling = |line: &&str| {
            !question.starts_with("info registers")
                || ["CPU#", "RIP", "CR0", "RAX", "RSI", "GS "].iter().any(|name| line.starts_with(name))
        };
        for line in answer.lines().filter(telling) {
            shown += &format!("    {line}\n");
        }
        if question.starts_with("info registers") {
            pause(BETWEEN).await;
        }
    }
    shown
}
