//! What runs the domains. One hypervisor so far: QEMU through libvirt.

pub(crate) mod domain_xml;
pub(crate) mod libvirt;
