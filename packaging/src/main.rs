//! `tether-manual FOLDER`: writes man pages and shell completions, from the command lines themselves and from the example
//! configs, and the API's reference. `packaging/build` runs it; it ships in no package. Not here: what is in the packages,
//! that stands in the Cargo.toml of each program.

mod guide;
mod reference;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Command;
use clap_complete::aot::{Bash, Fish, Zsh, generate_to};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};
use tether_agent_core::{daemon, program};

/// A config: the man page's name, its path, the command that reads it and that command's section, and the example.
const CONFIGS: [(&str, &str, &str, &str, &str); 3] = [
    (
        "tether-storage-agent.toml",
        program::STORAGE_AGENT.config_file,
        program::STORAGE_AGENT.name,
        "8",
        include_str!("../examples/storage-agent.toml"),
    ),
    (
        "tether-compute-agent.toml",
        program::COMPUTE_AGENT.config_file,
        program::COMPUTE_AGENT.name,
        "8",
        include_str!("../examples/compute-agent.toml"),
    ),
    (
        "tether.toml",
        "~/.config/tether/tether.toml, /etc/tether/tether.toml",
        "tether",
        "1",
        include_str!("../examples/tether.toml"),
    ),
];

fn main() -> anyhow::Result<()> {
    let folder = std::env::args_os().nth(1).context("usage: tether-manual FOLDER")?;
    write_all(&PathBuf::from(folder))
}

/// Pages to `man`, completions to `bash`, `zsh` and `fish`, the reference beside them.
fn write_all(folder: &Path) -> anyhow::Result<()> {
    let part = |name: &str| {
        let path = folder.join(name);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        anyhow::Ok(path)
    };
    let (man, bash, zsh, fish) = (part("man")?, part("bash")?, part("zsh")?, part("fish")?);
    let commands = [
        (tether_controller::command(), "1"),
        (daemon::command(&program::STORAGE_AGENT), "8"),
        (daemon::command(&program::COMPUTE_AGENT), "8"),
    ];
    for (mut command, section) in commands {
        command = command.disable_help_subcommand(true);
        command.build();
        pages(&command, section, &man)?;
        let name = command.get_name().to_owned();
        generate_to(Bash, &mut command, &name, &bash)?;
        generate_to(Zsh, &mut command, &name, &zsh)?;
        generate_to(Fish, &mut command, &name, &fish)?;
    }
    let path = folder.join(reference::FILE);
    fs::write(&path, reference::markdown()?).with_context(|| format!("writing {}", path.display()))?;
    let path = man.join(guide::FILE);
    fs::write(&path, guide::page(&source())).with_context(|| format!("writing {}", path.display()))?;
    for (name, path, program, section, example) in CONFIGS {
        let page = config_page(name, path, program, section, example);
        let path = man.join(format!("{name}.5"));
        fs::write(&path, page).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// The page of a command and of all below it.
fn pages(command: &Command, section: &str, folder: &Path) -> anyhow::Result<()> {
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        pages(below, section, folder)?;
    }
    let man = Man::new(command.clone()).section(section).source(source()).manual("Tether");
    let path = folder.join(man.get_filename());
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.get_subcommands().any(|below| !below.is_hide_set()) {
        man.render_subcommands_section(&mut page)?;
    }
    if let Some(text) = command.get_after_long_help().or(command.get_after_help()) {
        // Tables and commands: each line is to stay a line, which clap_mangen's own rendering does not do.
        let mut roff = Roff::new();
        as_it_stands(&mut roff, "NOTES AND EXAMPLES", &text.to_string());
        roff.to_writer(&mut page)?;
    }
    fs::write(&path, page).with_context(|| format!("writing {}", path.display()))
}

/// The page of a config file: where it is, what checks it, and the example with every key explained.
fn config_page(name: &str, path: &str, program: &str, section: &str, example: &str) -> String {
    let mut roff = Roff::new();
    roff.control("TH", [name, "5", "", &source(), "Tether"]);
    roff.control("SH", ["NAME"]);
    roff.text([roman(format!("{name} - the config of {program}"))]);
    roff.control("SH", ["SYNOPSIS"]);
    roff.text([italic(path)]);
    roff.control("SH", ["DESCRIPTION"]);
    roff.text([
        roman("The config is in TOML. Keys that are not known are refused. The example below has every key, with what it means and what is used when it is left out. It is the file that the package installs; see "),
        bold(program),
        roman(format!("({section}) for how to check it and how to name another one.")),
    ]);
    as_it_stands(&mut roff, "EXAMPLE", example);
    roff.control("SH", ["SEE ALSO"]);
    roff.text([bold(program), roman(format!("({section})"))]);
    roff.render()
}

/// A section whose lines stay lines.
fn as_it_stands(roff: &mut Roff, heading: &str, text: &str) {
    roff.control("SH", [heading]);
    roff.control("nf", []);
    for line in text.lines() {
        roff.text([roman(line)]);
    }
    roff.control("fi", []);
}

fn source() -> String {
    format!("Tether {}", env!("CARGO_PKG_VERSION"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_and_config_has_a_page_and_every_program_completions() {
        let folder = tempfile::tempdir().unwrap();
        write_all(folder.path()).unwrap();
        let read = |path: &str| fs::read_to_string(folder.path().join(path)).expect(path);
        let page = read("man/tether-volume-create.1");
        assert!(page.contains("\\-\\-multi\\-attach") && page.contains("NOTES AND EXAMPLES"), "{page}");
        assert!(read("man/tether.1").contains("tether\\-volume(1)"));
        let agent = read("man/tether-storage-agent.8");
        assert!(agent.contains("check\\-config") && agent.contains("Makes volumes and exports"), "{agent}");
        read("man/tether-compute-agent.8");
        // Every line of the example, none of it taken for a request of roff.
        let config = read("man/tether-storage-agent.toml.5");
        assert!(config.contains("[pool.fast]") && config.contains("volume_group = \"vg0\""), "{config}");
        assert!(!config.lines().any(|line| line.starts_with("'")), "{config}");
        read("man/tether-compute-agent.toml.5");
        read("man/tether.toml.5");
        read("man/tether.7");
        for path in ["bash/tether.bash", "zsh/_tether", "fish/tether.fish", "bash/tether-compute-agent.bash"]
        {
            assert!(read(path).contains("tether"), "{path}");
        }
    }
}
