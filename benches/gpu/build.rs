//! Lists the tests of the CUDA kernels, `tests/*_cuda.rs`, as modules of one test program: what they
//! share, the kernels too, is in it once.

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=../../tests");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests");
    let files = std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path());
    let name = |path: &Path| Some(path.file_name()?.to_str()?.strip_suffix(".rs")?.to_string());
    let mut names: Vec<String> = files.filter_map(|path| name(&path)).collect();
    names.retain(|name| name.ends_with("_cuda"));
    names.sort();
    let module = |name| format!("#[path = {:?}]\nmod {name};\n", folder.join(format!("{name}.rs")));
    let modules: String = names.iter().map(module).collect();
    let out = std::env::var_os("OUT_DIR").unwrap();
    std::fs::write(Path::new(&out).join("tests.rs"), modules).unwrap();
}
