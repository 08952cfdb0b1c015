//! Generates the wire types with protox, so that no protoc is needed, and the descriptor set for reflection.

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(
        ["tether/v1/common.proto", "tether/v1/storage.proto", "tether/v1/compute.proto"],
        ["proto"],
    )?;
    let folder = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(folder.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // prost's Debug would print the CHAP secret (F44); ours is in src/wire_debug.rs.
        .skip_debug(["tether.v1.IscsiConnection"])
        .compile_fds(descriptors)?;
    Ok(())
}
