//! Compiles `proto/` into `OUT_DIR` with a protoc written in Rust; generated code is never committed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let protos = [
        "proto/ext_proc.proto",
        "proto/health.proto",
        "proto/otlp_trace.proto",
        "proto/vertex_ai.proto",
        "proto/vllm_engine.proto",
    ];
    let files = protox::compile(protos, ["proto"])?;
    let mut prost = prost_build::Config::new();
    // Bodies and header values stay slices of the received HTTP/2 frames.
    prost.bytes(["."]);
    // Metadata has one or two entries: a tree of them is one allocation and no hashing.
    prost.btree_map([".envoy"]);
    tonic_prost_build::configure()
        .build_client(true)
        .build_transport(false)
        .compile_fds_with_config(files, prost)?;
    Ok(())
}
