//! Compiles `kernels/*.cu`: with nvcc for the feature `cuda`, with a C++ compiler and the stand-in of
//! `src/cuda/simt` for the feature `simt`. Without either it only looks at the compiler's version.

#[cfg(any(feature = "cuda", feature = "simt"))]
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    allow_avx512();
    #[cfg(feature = "cuda")]
    cuda::build();
    #[cfg(feature = "simt")]
    simt::build();
}

/// Sets `ppo_avx512` from Rust 1.89 on, the first that compiles for AVX-512; before that the loops on
/// the CPU stop at AVX2.
fn allow_avx512() {
    println!("cargo:rustc-check-cfg=cfg(ppo_avx512)");
    let rustc = std::env::var_os("RUSTC").unwrap_or("rustc".into());
    let version = std::process::Command::new(rustc).arg("--version").output();
    let version = version.map(|said| String::from_utf8_lossy(&said.stdout).into_owned());
    // "rustc 1.89.0 (..)"
    let minor = version.ok().and_then(|v| v.split('.').nth(1)?.parse::<u32>().ok());
    if minor.is_some_and(|minor| minor >= 89) {
        println!("cargo:rustc-cfg=ppo_avx512");
    }
}

/// Tells whether what is built is only looked at, so that no kernel needs to be compiled: the documentation,
/// which is built where there is no nvcc, and lints.
#[cfg(any(feature = "cuda", feature = "simt"))]
fn is_never_run() -> bool {
    const VARIABLES: [&str; 2] = ["DOCS_RS", "PPO_KERNELS_LINT"];
    for variable in VARIABLES {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    VARIABLES.iter().any(|variable| std::env::var_os(variable).is_some())
}

/// A file of the package.
#[cfg(any(feature = "cuda", feature = "simt"))]
fn package(path: &str) -> PathBuf {
    PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap()).join(path)
}

#[cfg(any(feature = "cuda", feature = "simt"))]
fn out_dir() -> PathBuf {
    PathBuf::from(std::env::var_os("OUT_DIR").unwrap())
}

/// The names of `kernels/*.cu`, in order.
#[cfg(any(feature = "cuda", feature = "simt"))]
fn kernels() -> Vec<String> {
    let files = std::fs::read_dir(package("kernels")).unwrap();
    let paths = files.map(|file| file.unwrap().path());
    let sources = paths.filter(|path| path.extension().is_some_and(|e| e == "cu"));
    let mut names: Vec<String> =
        sources.map(|path| path.file_stem().unwrap().to_str().unwrap().into()).collect();
    names.sort();
    names
}

/// One fatbin a source, embedded through a table in `OUT_DIR/images.rs`.
#[cfg(feature = "cuda")]
mod cuda {
    use std::env;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::{fail, is_never_run, kernels, out_dir, package};

    /// Every architecture the kernels are for. Code for one runs on all later minor versions of it,
    /// and the PTX of the first on whatever comes later.
    const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];

    const ARCHS: &str = "PPO_KERNELS_CUDA_ARCHS";
    const CAP: &str = "CUDA_COMPUTE_CAP";

    pub fn build() {
        for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", ARCHS, CAP] {
            println!("cargo:rerun-if-env-changed={variable}");
        }
        let compiler = (!is_never_run()).then(Compiler::find);
        let image = |name: &str| out_dir().join(format!("{name}.fatbin"));
        let names = kernels();
        let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
        let compile = |name: &String| match &compiler {
            Some(compiler) => compiler.compile(name, &image(name)),
            None => std::fs::write(image(name), []).unwrap(),
        };
        std::thread::scope(|scope| {
            for share in names.chunks(names.len().div_ceil(threads)) {
                scope.spawn(|| share.iter().for_each(compile));
            }
        });
        let mut table = String::from("&[\n");
        for name in &names {
            table += &format!("({name:?}, &Image(*include_bytes!({:?}))),\n", image(name));
        }
        std::fs::write(out_dir().join("images.rs"), table + "]\n").unwrap();
    }

    struct Compiler {
        nvcc: PathBuf,
        architectures: Vec<u32>,
    }

    impl Compiler {
        fn find() -> Self {
            let home =
                |variable| env::var_os(variable).map(|home| PathBuf::from(home).join("bin/nvcc"));
            let on_path = env::var_os("PATH").into_iter().flat_map(|path| {
                env::split_paths(&path).map(|folder| folder.join("nvcc")).collect::<Vec<_>>()
            });
            let explicit = env::var_os("NVCC").map(PathBuf::from);
            let nvcc = explicit.or_else(|| {
                let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(home);
                let usual = [PathBuf::from("/usr/local/cuda/bin/nvcc")];
                homes.chain(on_path).chain(usual).find(|path| path.is_file())
            });
            let Some(nvcc) = nvcc else {
                fail(
                    "the feature `cuda` needs nvcc, the compiler of the CUDA toolkit (12.0 or later), \
                     and there is none in $CUDA_HOME/bin, $CUDA_PATH/bin, $PATH or /usr/local/cuda/bin. \
                     Install the toolkit, or set NVCC to the compiler, or build without `cuda`: \
                     the CPU backend needs none of it.",
                );
            };
            let known = known_architectures(&nvcc);
            let asked = [ARCHS, CAP].into_iter().find_map(|variable| {
                let text = env::var(variable).ok().filter(|text| !text.trim().is_empty())?;
                Some((variable, text))
            });
            let architectures = match asked {
                Some((variable, text)) => parse_architectures(variable, &text, &known),
                None => ARCHITECTURES.into_iter().filter(|arch| known.contains(arch)).collect(),
            };
            Compiler { nvcc, architectures }
        }

        fn compile(&self, name: &str, image: &Path) {
            let mut nvcc = Command::new(&self.nvcc);
            // --fmad=false: see kernels/common/softmax.cuh. Never --use_fast_math: NaN and -inf count.
            nvcc.args(["-std=c++17", "-O3", "--fmad=false", "-fatbin"]);
            for arch in &self.architectures {
                nvcc.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
            }
            let lowest = self.architectures.iter().min().unwrap();
            nvcc.arg(format!("-gencode=arch=compute_{lowest},code=compute_{lowest}"));
            nvcc.arg("-o").arg(image).arg(package(&format!("kernels/{name}.cu")));
            let status = nvcc.status();
            if !status.as_ref().is_ok_and(|status| status.success()) {
                fail(&format!("{nvcc:?} did not compile the kernel: {status:?}"));
            }
        }
    }

    /// What this nvcc can compile for.
    fn known_architectures(nvcc: &Path) -> Vec<u32> {
        let output = Command::new(nvcc).arg("--list-gpu-code").output();
        let Ok(output) = output else {
            fail(&format!(
                "{nvcc:?} cannot be run: {output:?}. Set NVCC to the CUDA toolkit's compiler."
            ));
        };
        let text = String::from_utf8_lossy(&output.stdout);
        text.lines().filter_map(|line| line.trim().strip_prefix("sm_")?.parse().ok()).collect()
    }

    /// Reads "80,90", "8.0 9.0" and the like.
    fn parse_architectures(variable: &str, text: &str, known: &[u32]) -> Vec<u32> {
        let words = text.split([',', ';', ' ']).filter(|word| !word.is_empty());
        words
            .map(|word| match word.replace('.', "").parse() {
                Ok(arch) if known.contains(&arch) && arch >= 80 => arch,
                _ => fail(&format!(
                    "{variable} names the architecture {word:?}; the kernels need 80 or later, \
                     and this nvcc knows {known:?}"
                )),
            })
            .collect()
    }
}

/// Ends the build with a message, without the noise of a panic.
#[cfg(any(feature = "cuda", feature = "simt"))]
fn fail(message: &str) -> ! {
    println!("cargo:warning={message}");
    eprintln!("error: {message}");
    std::process::exit(1)
}

/// The kernels for the CPU, as a static library; see `src/cuda/simt`.
#[cfg(feature = "simt")]
mod simt {
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::{fail, is_never_run, kernels, out_dir, package};

    /// Sanitizers for which the kernels are compiled once more, each time into a library of their own:
    /// `address,undefined;thread` makes two. Tests run with one of them if PPO_KERNELS_SIMT is its first
    /// sanitizer's name, and that sanitizer's runtime is loaded before all else.
    const SANITIZE: &str = "PPO_KERNELS_SIMT_SANITIZE";

    /// Bugs for the tests to find; the file says in which form.
    const PLANTED: &str = "tests/planted_bugs.txt";

    pub fn build() {
        println!("cargo:rerun-if-env-changed={SANITIZE}");
        println!("cargo:rerun-if-changed=src/cuda/simt");
        println!("cargo:rerun-if-changed={PLANTED}");
        if is_never_run() {
            return;
        }
        // Kernels are found by name at run time: the linker must keep what nobody calls.
        let mut build = kernels_for(&[]);
        build.link_lib_modifier("+whole-archive").compile("ppo_kernels_simt_kernels");
        scheduler().compile("ppo_kernels_simt");
        let sanitizers = std::env::var(SANITIZE).unwrap_or_default();
        for of_library in sanitizers.split(';').filter(|names| !names.is_empty()) {
            shared_library(&of_library.split(',').collect::<Vec<_>>());
        }
    }

    /// The kernels and a scheduler of their own, as the scheduler of the tests loads them.
    fn shared_library(sanitizers: &[&str]) {
        if let Some(other) =
            sanitizers.iter().find(|s| !["address", "undefined", "thread"].contains(s))
        {
            fail(&format!("{SANITIZE} names {other:?}; there are address, undefined and thread"));
        }
        let build = kernels_for(sanitizers);
        let mut link = build.get_compiler().to_command();
        link.args(["-shared", "-Wl,-Bsymbolic", "-o"]);
        link.arg(out_dir().join(format!("simt_{}.so", sanitizers[0])));
        link.args(build.compile_intermediates()).args(scheduler().compile_intermediates());
        let status = link.status();
        if !status.as_ref().is_ok_and(|status| status.success()) {
            fail(&format!("{link:?} did not link the kernels: {status:?}"));
        }
    }

    /// The kernels, and those with the planted bugs that these sanitizers are to report, or all.
    fn kernels_for(sanitizers: &[&str]) -> cc::Build {
        let mut build = compiler();
        // Types are read through pointers to bytes, as on the device.
        build.flag("-fno-strict-aliasing").flag("-ffp-contract=off").flag("-g1");
        if !sanitizers.is_empty() {
            build.flag(format!("-fsanitize={}", sanitizers.join(",")));
            build.flag("-fno-sanitize-recover=all");
        }
        for name in kernels() {
            build.file(wrapper("", &name, &package("kernels")));
        }
        let wanted =
            |bug: &Bug| sanitizers.is_empty() || sanitizers.contains(&bug.sanitizer.as_str());
        for bug in planted_bugs().into_iter().filter(wanted) {
            build.file(wrapper(&bug.name, &bug.kernel, &bug.plant()));
        }
        build
    }

    /// Never compiled with a sanitizer.
    fn scheduler() -> cc::Build {
        let mut build = compiler();
        build.define("SIMT_LIBRARIES", format!("{:?}", out_dir()).as_str());
        build.file(package("src/cuda/simt/simt.cpp"));
        build
    }

    fn compiler() -> cc::Build {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++20").opt_level(1).warnings(true).flag("-Wno-unknown-pragmas");
        build.include(package("src/cuda/simt"));
        build
    }

    /// A source that includes the kernel. In a namespace of its own: the same functions are in other
    /// kernels and, with other bodies, in those with bugs planted in them.
    fn wrapper(variant: &str, kernel: &str, folder: &Path) -> PathBuf {
        let source = folder.join(format!("{kernel}.cu"));
        let text = format!(
            "#include \"simt.h\"\n#define SIMT_VARIANT {variant:?}\nnamespace {{\n#include {source:?}\n}}\n"
        );
        let path = out_dir().join(format!("simt_{kernel}_{variant}.cpp"));
        fs::write(&path, text).unwrap();
        path
    }

    struct Bug {
        name: String,
        kernel: String,
        sanitizer: String,
        file: String,
        right: String,
        wrong: String,
    }

    fn planted_bugs() -> Vec<Bug> {
        let text = fs::read_to_string(package(PLANTED)).unwrap();
        let mut bugs = Vec::new();
        for block in text.split("\n\n").filter(|block| !block.starts_with('#')) {
            let field = |key: &str| {
                let line =
                    block.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
                line.unwrap_or_default().replace("\\n", "\n")
            };
            bugs.push(Bug {
                name: field("bug"),
                kernel: field("kernel"),
                sanitizer: field("sanitizer"),
                file: field("file"),
                right: field("right"),
                wrong: field("wrong"),
            });
        }
        bugs
    }

    impl Bug {
        /// A copy of the kernels with the bug in it.
        fn plant(&self) -> PathBuf {
            let folder = out_dir().join("planted").join(&self.name);
            fs::create_dir_all(folder.join("common")).unwrap();
            for part in ["", "common"] {
                for entry in fs::read_dir(package("kernels").join(part)).unwrap() {
                    let path = entry.unwrap().path();
                    if path.is_file() {
                        let to = folder.join(part).join(path.file_name().unwrap());
                        fs::write(to, fs::read(&path).unwrap()).unwrap();
                    }
                }
            }
            let path = folder.join(&self.file);
            let text = fs::read_to_string(&path).unwrap_or_default();
            let times = text.matches(&self.right).count();
            if self.right.is_empty() || times != 1 {
                fail(&format!(
                    "{PLANTED}: the line to replace for {:?} is {times} times in {}, expected once",
                    self.name, self.file
                ));
            }
            fs::write(&path, text.replace(&self.right, &self.wrong)).unwrap();
            folder
        }
    }
}
