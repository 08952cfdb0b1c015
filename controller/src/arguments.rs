//! The command line: every verb, option and help text. Not here: what the verbs do.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tether_proto::{
    AttachmentId, ByteSize, DiskBus, DiskCache, DiskDiscard, DiskIo, DomainName, PoolName, Serial,
    TargetDevice, VolumeFormat, VolumeKey, wire,
};

const GLOBAL: &str = "Global options";

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    another failure; of `tether doctor`: the worst finding is a warning
  2    `tether doctor`: the worst finding is an error
  3    not found: volume, domain, attachment
  4    refused in the present state: in use, exists with other parameters, another operation runs
  5    an agent, or something that it needs, cannot be reached
  6    the deadline passed, or the outcome is not known; the agents may go on with it
  7    permission or certificate
  8    no room: pool full, no free slot
  64   bad usage or config
  130  interrupted; the agents go on with what they were told

Example:
  tether volume create tether/v1 10G
  tether attach tether/v1 c2
  tether list";

/// Turns storage of one host into disks of virtual machines on others.
#[derive(Debug, Parser)]
#[command(name = "tether", version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub(crate) struct Arguments {
    /// The config [default: $TETHER_CONFIG, ~/.config/tether/tether.toml, /etc/tether/tether.toml].
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Print one JSON object, also for a failure, and no progress.
    #[arg(long, global = true, help_heading = GLOBAL)]
    pub(crate) json: bool,
    /// Print the result and errors, and no progress.
    #[arg(long, short, global = true, help_heading = GLOBAL)]
    pub(crate) quiet: bool,
    /// How long the command may take. The agents go on with what they were told.
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "SECONDS", default_value_t = 120,
          value_parser = clap::value_parser!(u64).range(1..=3_600))]
    pub(crate) timeout: u64,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Make, show, list, extend and delete volumes.
    #[command(
        subcommand,
        after_help = "Examples:\n  tether volume create tether/v1 10G\n  tether volume list"
    )]
    Volume(VolumeVerb),
    /// See the pools in which volumes live.
    #[command(subcommand, after_help = "Example:\n  tether pool list")]
    Pool(PoolVerb),
    /// Make a volume a disk of a domain.
    Attach(Box<Attach>),
    /// Take a disk out of its domain and end its export.
    Detach(Detach),
    /// All attachments, also those that are half made.
    #[command(after_help = "Examples:\n  tether list\n  tether list --all")]
    List {
        /// Also what else is on the hosts: targets, sessions, shares, mounts and disks, whose they are, and why.
        #[arg(long)]
        all: bool,
    },
    /// What both agents know of one attachment.
    #[command(after_help = "Example:\n  tether show 5f1c0e0a-7d1f-4a53-9d3c-0b7f3c0f7d11")]
    Show {
        /// The attachment.
        #[arg(value_name = "ID")]
        id: AttachmentId,
    },
    /// Bring both agents back to what their journals say: what is missing comes back, what was cut off is finished or undone.
    #[command(after_help = "Example:\n  tether reconcile --dry-run")]
    Reconcile {
        /// Change nothing, and say what would be done.
        #[arg(long)]
        dry_run: bool,
    },
    /// Say what is wrong, or may go wrong, on all hosts and between them, and what mends it. Changes nothing.
    #[command(after_help = "\
Exit codes:
  0    nothing is wrong, or no more than a note
  1    the worst finding is a warning
  2    the worst finding is an error; a host that cannot be asked is one

Example:
  tether doctor

On a host itself, also when its agent does not run: tether-storage-agent doctor, tether-compute-agent doctor")]
    Doctor,
    /// Say what happens on all hosts until it is interrupted: connections lost and back, pools that fill up, guests' I/O errors,
    /// resizes, and what is not as the agents have it.
    #[command(after_help = "\
What holds when it begins is told first. --json prints one object a line. --timeout does not end it.

Examples:
  tether watch
  tether watch --json | jq --unbuffered 'select(.kind == \"pool_filling\")'")]
    Watch,
    /// Make a certificate authority, and certificates for agents and controllers.
    #[command(
        subcommand,
        after_help = "\
Examples:
  tether pki init --directory pki
  tether pki issue agent storage1 --address storage1.example.com --directory pki
  tether pki issue controller admin --directory pki"
    )]
    Pki(PkiVerb),
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeVerb {
    /// Make a volume.
    Create(Create),
    /// Make a volume larger, also while it is attached; its guest sees the new size at once.
    Extend(Extend),
    /// Show a volume.
    #[command(after_help = "Example:\n  tether volume show tether/v1")]
    Show {
        /// Pool and name of the volume.
        #[arg(value_name = "POOL/NAME")]
        volume: VolumeKey,
        #[command(flatten)]
        host: StorageHost,
    },
    /// List volumes, of all storage hosts unless one is named.
    #[command(after_help = "Example:\n  tether volume list --pool tether")]
    List {
        /// Only this pool.
        #[arg(long, value_name = "POOL")]
        pool: Option<PoolName>,
        #[command(flatten)]
        host: StorageHost,
    },
    /// Delete a volume that Tether made and that is not exported. Nothing is asked.
    #[command(after_help = "Example:\n  tether volume delete tether/v1")]
    Delete {
        /// Pool and name of the volume.
        #[arg(value_name = "POOL/NAME")]
        volume: VolumeKey,
        #[command(flatten)]
        host: StorageHost,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tether volume create tether/v1 10G
  tether volume create share/v1 10G --format qcow2
  tether volume create tether/cluster 10G --multi-attach")]
pub(crate) struct Create {
    /// Pool and name of the volume.
    #[arg(value_name = "POOL/NAME")]
    pub(crate) volume: VolumeKey,
    /// Its size: 10G and 10GiB are 10 x 2^30 bytes, 10GB is 10 x 10^9.
    #[arg(value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) size: ByteSize,
    /// What is in it: raw, or qcow2 in a pool that is a directory [default: raw].
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Option<VolumeFormat>,
    /// thick takes all space at once, thin takes it as it is written [default: as the pool does].
    #[arg(long, value_name = "HOW", hide_possible_values = true)]
    pub(crate) provisioning: Option<Provisioning>,
    /// Several hosts may have it at a time, and write: only for guests that agree among themselves, such as a cluster.
    #[arg(long)]
    pub(crate) multi_attach: bool,
    #[command(flatten)]
    pub(crate) host: StorageHost,
}

/// How a volume's space is had.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Provisioning {
    Thick,
    Thin,
}

impl From<Provisioning> for wire::Provisioning {
    fn from(provisioning: Provisioning) -> Self {
        match provisioning {
            Provisioning::Thick => Self::Thick,
            Provisioning::Thin => Self::Thin,
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  tether volume extend tether/v1 20G

First the volume is made larger, then the guest that has it is told. When the second part fails, the same command
again finishes it. A volume is never made smaller. What is in it, such as a file system, is enlarged in the guest.")]
pub(crate) struct Extend {
    /// Pool and name of the volume.
    #[arg(value_name = "POOL/NAME")]
    pub(crate) volume: VolumeKey,
    /// Its new size, written as for `tether volume create`.
    #[arg(value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) size: ByteSize,
    #[command(flatten)]
    pub(crate) host: StorageHost,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PoolVerb {
    /// List pools and their room, of all storage hosts unless one is named.
    #[command(after_help = "Example:\n  tether pool list")]
    List {
        #[command(flatten)]
        host: StorageHost,
    },
}

#[derive(Debug, Args)]
pub(crate) struct StorageHost {
    /// The storage host, as named in the config. Not needed when there is one.
    #[arg(long, value_name = "HOST")]
    pub(crate) storage: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tether attach tether/v1 c2
  tether attach tether/v1 c2 --bus scsi --target-device sdb --serial DATA1

The attachment's id is printed first. When the outcome is not known, the same command with --id ID goes on with
the same attachment; it never makes a second one.")]
pub(crate) struct Attach {
    /// Pool and name of the volume.
    #[arg(value_name = "POOL/NAME")]
    pub(crate) volume: VolumeKey,
    /// The libvirt domain, by name or UUID.
    #[arg(value_name = "DOMAIN")]
    pub(crate) domain: DomainName,
    /// The storage host, as named in the config. Not needed when there is one.
    #[arg(long, value_name = "HOST")]
    pub(crate) storage: Option<String>,
    /// The compute host, as named in the config. Not needed when there is one.
    #[arg(long, value_name = "HOST")]
    pub(crate) compute: Option<String>,
    /// The bus on which the guest sees the disk: virtio or scsi [default: virtio].
    #[arg(long, value_name = "BUS")]
    pub(crate) bus: Option<DiskBus>,
    /// A wish for the target device, such as vdb or sdb [default: the first free one].
    #[arg(long, value_name = "DEVICE")]
    pub(crate) target_device: Option<TargetDevice>,
    /// Host caching: none, writethrough, writeback or directsync [default: none].
    #[arg(long, value_name = "MODE")]
    pub(crate) cache: Option<DiskCache>,
    /// Host I/O: native, threads or io_uring [default: native for a block device where the cache mode allows it, else
    /// threads].
    #[arg(long, value_name = "MODE")]
    pub(crate) io: Option<DiskIo>,
    /// What becomes of the guest's discards: unmap or ignore [default: ignore for a thick volume that is a file, else unmap].
    #[arg(long, value_name = "MODE")]
    pub(crate) discard: Option<DiskDiscard>,
    /// Export read-only: neither host nor guest can write.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// The serial that the guest sees, 1 to 20 characters [default: the volume's own].
    #[arg(long, value_name = "SERIAL")]
    pub(crate) serial: Option<Serial>,
    /// Only into the running domain, not into its persistent definition.
    #[arg(long)]
    pub(crate) live_only: bool,
    /// Go on with this attachment [default: a new one].
    #[arg(long, value_name = "UUID")]
    pub(crate) id: Option<AttachmentId>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tether detach 5f1c0e0a-7d1f-4a53-9d3c-0b7f3c0f7d11
  tether detach tether/v1 c2
  tether detach 5f1c0e0a-7d1f-4a53-9d3c-0b7f3c0f7d11 --force

Also finishes an attachment that is half made. A guest that does not let go of its disk keeps it: the command fails,
and the storage stays connected.")]
pub(crate) struct Detach {
    /// The attachment's id, or pool and name of the volume.
    #[arg(value_name = "ID|POOL/NAME")]
    pub(crate) subject: Subject,
    /// The domain; only with POOL/NAME.
    #[arg(value_name = "DOMAIN")]
    pub(crate) domain: Option<DomainName>,
    /// How long the guest may take to let go of the disk, on top of --timeout [default: the agent's].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3_600))]
    pub(crate) guest_timeout: Option<u64>,
    /// Go on where detach would stop: a guest that holds the disk, a flush that fails, a host that is lost for good. Writes
    /// may be lost; the command tells which.
    #[arg(long)]
    pub(crate) force: bool,
}

/// What is to be detached.
#[derive(Debug, Clone)]
pub(crate) enum Subject {
    Attachment(AttachmentId),
    Volume(VolumeKey),
}

impl std::str::FromStr for Subject {
    type Err = tether_proto::ParseError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.contains('/') { text.parse().map(Self::Volume) } else { text.parse().map(Self::Attachment) }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum PkiVerb {
    /// Make a certificate authority.
    #[command(after_help = "Example:\n  tether pki init --directory pki")]
    Init {
        #[command(flatten)]
        place: Place,
    },
    /// Make a key and a certificate, signed by the authority.
    #[command(
        subcommand,
        after_help = "\
Examples:
  tether pki issue agent storage1 --address storage1.example
  tether pki issue controller admin --role operator"
    )]
    Issue(IssueVerb),
}

#[derive(Debug, Subcommand)]
pub(crate) enum IssueVerb {
    /// For an agent: proves which host it is.
    #[command(
        after_help = "Example:\n  tether pki issue agent storage1 --address storage1.example --address 192.0.2.10"
    )]
    Agent {
        /// The host's name, as in the section of the controller's config.
        #[arg(value_name = "NAME")]
        name: String,
        /// Another name or address under which it is reached. May be given several times.
        #[arg(long = "address", value_name = "IP_OR_DNS")]
        addresses: Vec<String>,
        #[command(flatten)]
        place: Place,
    },
    /// For a controller: may do everything at every agent.
    #[command(after_help = "Example:\n  tether pki issue controller controller")]
    Controller(ClientCertificate),
    /// For an operator: may look, examine hosts (doctor), and let agents put right what is not as it was asked for (reconcile).
    #[command(after_help = "Example:\n  tether pki issue operator oncall")]
    Operator(ClientCertificate),
    /// For a reader, such as monitoring: may look, and change nothing.
    #[command(after_help = "Example:\n  tether pki issue reader monitoring")]
    Reader(ClientCertificate),
}

#[derive(Debug, Args)]
pub(crate) struct ClientCertificate {
    /// The client's name, as the agents' logs will have it.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) place: Place,
}

#[derive(Debug, Args)]
pub(crate) struct Place {
    /// Where the authority's files are.
    #[arg(long, value_name = "DIR", default_value = "pki")]
    pub(crate) directory: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound_and_every_verb_has_an_example() {
        fn check(command: &clap::Command) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{}", command.get_name());
            command.get_subcommands().for_each(check);
        }
        Arguments::command().debug_assert();
        check(&Arguments::command());
    }
}
