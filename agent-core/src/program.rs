//! What the two agents are called, and where their configs are: for their own `main`, and for whoever writes their man
//! pages. Not here: their arguments (`daemon`).

/// One agent's program.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// Its name, also that of its package and of its unit.
    pub name: &'static str,
    /// What it does, in one line.
    pub about: &'static str,
    /// Where its config is when nobody says otherwise.
    pub config_file: &'static str,
}

/// The agent on a storage host.
pub const STORAGE_AGENT: Program = Program {
    name: "tether-storage-agent",
    about: "Makes volumes and exports them to hypervisors",
    config_file: "/etc/tether/storage-agent.toml",
};

/// The agent on a hypervisor.
pub const COMPUTE_AGENT: Program = Program {
    name: "tether-compute-agent",
    about: "Connects exports and plugs them into libvirt domains",
    config_file: "/etc/tether/compute-agent.toml",
};
