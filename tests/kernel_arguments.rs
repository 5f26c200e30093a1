//! The structs that kernels take are written twice, in `kernels/*.cu` and in Rust: here they are read
//! from both sources and compared, field by field, name, order and type. So are constants of the same
//! name. No GPU and no compiler of CUDA is needed.
//!
//! In Rust a list of inputs or outputs stands in the argument struct as one field, of the space
//! `Pointers`; in CUDA its fields stand in the struct themselves.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use proc_macro2::{TokenStream, TokenTree};
use quote::{format_ident, quote, ToTokens};
use regex::Regex;
use syn::parse::ParseStream;
use syn::{
    braced, parenthesized, Attribute, Expr, Fields, GenericArgument, Generics, Ident, Item,
    ItemStruct, PathArguments, Token, Type,
};

/// A field as CUDA has it: `const float*`, say, and its name.
type Field = (String, String);

type Structs<T> = BTreeMap<String, T>;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every op, by its kernels.
fn ops() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut ops: Vec<String> = files
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_string())
        .collect();
    ops.sort();
    ops
}

// ---- CUDA ----

/// The text of a file of kernels with all that it includes, without comments.
fn cuda_source(path: &str) -> String {
    let include = Regex::new(r#"(?m)^#include "([^"]+)""#).unwrap();
    let (mut source, mut seen, mut todo) = (String::new(), Vec::new(), vec![path.to_string()]);
    while let Some(path) = todo.pop() {
        if seen.contains(&path) {
            continue;
        }
        let text = read(&path);
        let folder = path.rsplit_once('/').unwrap().0;
        todo.extend(include.captures_iter(&text).map(|found| format!("{folder}/{}", &found[1])));
        source += &text;
        seen.push(path);
    }
    Regex::new(r"//[^\n]*").unwrap().replace_all(&source, "").into_owned()
}

/// The bodies of structs; those with functions in them are no arguments.
fn cuda_structs(source: &str) -> Structs<String> {
    let body = Regex::new(r"(?m)^struct (\w+) \{([^{}()]*)\};").unwrap();
    let plain = body.captures_iter(source);
    plain.map(|found| (found[1].to_string(), found[2].to_string())).collect()
}

fn cuda_fields(body: &str) -> Vec<Field> {
    let declaration =
        Regex::new(r"([\w\s]+?[\s*]+)(\w+(?:\s*\[[^\]]+\])?(?:\s*,[^;]+)?);").unwrap();
    let declarator = Regex::new(r"^\s*(\w+)\s*(\[.+\])?\s*$").unwrap();
    let mut fields = Vec::new();
    for found in declaration.captures_iter(body) {
        for one in found[2].split(',') {
            let one = declarator.captures(one).expect("a name, and a length in brackets");
            let length = one.get(2).map_or("", |length| length.as_str());
            fields.push((squeeze(&format!("{}{length}", found[1].trim())), one[1].to_string()));
        }
    }
    assert_eq!(fields.len(), body.matches([';', ',']).count(), "not understood: {body}");
    fields
}

/// Without spaces but between words.
fn squeeze(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    Regex::new(r" ?([^\w ]) ?").unwrap().replace_all(&words.join(" "), "$1").into_owned()
}

fn cuda_constants(source: &str) -> BTreeMap<String, String> {
    let constant = Regex::new(r"(?m)^constexpr \w+ (\w+) = ([^;]+);").unwrap();
    let found = constant.captures_iter(source);
    let mut all: BTreeMap<String, String> =
        found.map(|found| (found[1].to_string(), found[2].to_string())).collect();
    // And the names of plain enums, which count from 0.
    let plain = Regex::new(r"(?m)^enum \w+ \{([^}=]*)\};").unwrap();
    for found in plain.captures_iter(source) {
        let names = found[1].split(',').map(str::trim).filter(|name| !name.is_empty());
        all.extend(names.enumerate().map(|(number, name)| (name.to_string(), number.to_string())));
    }
    all
}

// ---- Rust ----

/// The Rust sources that an op's argument structs are put together from.
fn rust_files(op: &str) -> Vec<syn::File> {
    let shared = [
        "src/moments.rs",
        "src/moments/cuda.rs",
        "src/kl/cuda.rs",
        "src/logprob/mod.rs",
        "src/logprob/cuda.rs",
        "src/cuda/rows.rs",
    ];
    let own = [format!("src/{op}/mod.rs"), format!("src/{op}/cuda.rs")];
    // The op's own come last: of structs of one name they count.
    let paths = shared.into_iter().map(str::to_string).chain(own);
    paths.map(|path| syn::parse_file(&read(&path)).expect("Rust")).collect()
}

fn rust_structs(files: &[syn::File]) -> Structs<ItemStruct> {
    let items = files.iter().flat_map(|file| &file.items);
    let structs = items.filter_map(|item| match item {
        Item::Struct(item) => Some(item.clone()),
        Item::Macro(item) if item.mac.path.is_ident("list") => {
            Some(item.mac.parse_body_with(list).expect("a list"))
        }
        _ => None,
    });
    structs.map(|item| (item.ident.to_string(), item)).collect()
}

/// The struct that `list!` of src/memory.rs makes.
fn list(input: ParseStream) -> syn::Result<ItemStruct> {
    Attribute::parse_outer(input)?;
    let way = match input.parse::<Ident>()?.to_string().as_str() {
        "inputs" => format_ident!("In"),
        _ => format_ident!("Out"),
    };
    let name: Ident = input.parse()?;
    let types: Generics = input.parse()?;
    let types: Vec<_> = types.type_params().collect();
    let sizes;
    parenthesized!(sizes in input);
    sizes.parse::<TokenStream>()?;
    let mut fields = Vec::new();
    if input.peek(Ident) {
        input.parse::<Ident>()?; // with
        Attribute::parse_outer(input)?;
        let (name, _, list): (Ident, Token![:], Type) =
            (input.parse()?, input.parse()?, input.parse()?);
        fields.push(quote!(#name: #list));
    }
    while !input.is_empty() {
        let optional = input.peek(Ident);
        if optional {
            input.parse::<Ident>()?;
        }
        let arrays;
        braced!(arrays in input);
        while !arrays.is_empty() {
            Attribute::parse_outer(&arrays)?;
            let (name, _, of): (Ident, Token![:], Type) =
                (arrays.parse()?, arrays.parse()?, arrays.parse()?);
            // Shape, and what it may be over.
            while !arrays.is_empty() && !arrays.peek(Token![,]) {
                arrays.parse::<TokenTree>()?;
            }
            arrays.parse::<Option<Token![,]>>()?;
            let array = quote!(S::#way<'a, #of>);
            fields.push(if optional {
                quote!(#name: Option<#array>)
            } else {
                quote!(#name: #array)
            });
        }
    }
    syn::parse2(quote!(pub struct #name<'a, S: Space, #(#types),*> { #(#fields),* }))
}

/// The names of the structs that the op's kernels are launched with.
fn rust_arguments(op: &str) -> Vec<String> {
    let marker = Regex::new(r"unsafe impl(?:<[^>]*>)? Args for (\w+)").unwrap();
    let found = read(&format!("src/{op}/cuda.rs"));
    marker.captures_iter(&found).map(|found| found[1].to_string()).collect()
}

/// The last name of a type's path, and the types and lifetimes it is given.
fn path(kind: &Type) -> Option<(String, Vec<Type>)> {
    let Type::Path(path) = kind else {
        return None;
    };
    let last = path.path.segments.last()?;
    let PathArguments::AngleBracketed(given) = &last.arguments else {
        return Some((last.ident.to_string(), Vec::new()));
    };
    let types = given.args.iter().filter_map(|given| match given {
        GenericArgument::Type(kind) => Some(kind.clone()),
        _ => None,
    });
    Some((last.ident.to_string(), types.collect()))
}

/// The fields as CUDA would have them, lists taken apart.
fn rust_fields(item: &ItemStruct, structs: &Structs<ItemStruct>) -> Vec<Field> {
    let Fields::Named(fields) = &item.fields else {
        panic!("{} has no names", item.ident);
    };
    let mut flat = Vec::new();
    for field in &fields.named {
        let name = field.ident.as_ref().unwrap().to_string();
        match path(&field.ty) {
            Some((list, _)) if is_list(&field.ty) => {
                let list = structs.get(&list).unwrap_or_else(|| panic!("no struct {list}"));
                flat.extend(rust_fields(list, structs));
            }
            _ => flat.push((cuda_type(&field.ty), name)),
        }
    }
    flat
}

/// Whether a type is a list of arrays: it is given a space.
fn is_list(kind: &Type) -> bool {
    let Some((_, given)) = path(kind) else {
        return false;
    };
    given.iter().filter_map(path).any(|(name, _)| name == "Pointers" || name == "S")
}

fn cuda_type(kind: &Type) -> String {
    match kind {
        Type::Ptr(pointer) => {
            let is_const = matches!(pointer.mutability, syn::PointerMutability::Const(_));
            let constant = if is_const { "const " } else { "" };
            format!("{constant}{}*", cuda_type(&pointer.elem))
        }
        Type::Array(array) => {
            let length = squeeze(&array.len.to_token_stream().to_string());
            format!("{}[{length}]", cuda_type(&array.elem))
        }
        _ => {
            let (name, given) = path(kind).expect("a path");
            match (name.as_str(), &given[..]) {
                ("Option", [inner]) => cuda_type(inner),
                ("In", [element]) => format!("const {}*", cuda_type(element)),
                ("Out", [element]) => format!("{}*", cuda_type(element)),
                ("f32", _) => "float".into(),
                ("f64", _) => "double".into(),
                ("i32", _) => "int32_t".into(),
                ("i64", _) => "int64_t".into(),
                ("u8", _) => "uint8_t".into(),
                ("u32", _) => "uint32_t".into(),
                // Kernels are compiled for every type of logits and take them as they come.
                ("c_void" | "T" | "I", _) => "void".into(),
                _ => name,
            }
        }
    }
}

fn rust_constants(files: &[syn::File]) -> BTreeMap<String, Expr> {
    let items = files.iter().flat_map(|file| &file.items);
    let constants = items.filter_map(|item| match item {
        Item::Const(item) => Some((item.ident.to_string(), (*item.expr).clone())),
        _ => None,
    });
    constants.collect()
}

// ---- both ----

/// Compares a struct, and those in it, which it returns the names of.
fn compare(
    op: &str,
    name: &str,
    rust: &Structs<ItemStruct>,
    cuda: &Structs<String>,
) -> Vec<String> {
    let ours = rust_fields(&rust[name], rust);
    let theirs = cuda.get(name).unwrap_or_else(|| panic!("kernels/{op}.cu has no struct {name}"));
    assert_eq!(ours, cuda_fields(theirs), "{op}: {name}, in Rust and in CUDA");
    let mut all = vec![name.to_string()];
    for (kind, _) in ours {
        let element = kind.trim_start_matches("const ").split(['*', '[']).next().unwrap();
        if rust.contains_key(element) && !all.iter().any(|seen| seen == element) {
            all.extend(compare(op, element, rust, cuda));
        }
    }
    all
}

#[test]
fn the_kernels_arguments_are_those_of_rust() {
    let mut compared = Vec::new();
    for op in ops() {
        let cuda = cuda_structs(&cuda_source(&format!("kernels/{op}.cu")));
        let rust = rust_structs(&rust_files(&op));
        for name in rust_arguments(&op) {
            compared.extend(compare(&op, &name, &rust, &cuda));
        }
        // Of whoever merges moments.
        if cuda.contains_key("MergeArgs") {
            compared.extend(compare(&op, "MergeArgs", &rust, &cuda));
        }
    }
    // Those in several files are named once; a new one need not be named here.
    for name in [
        "GaeArgs",
        "Shaping",
        "Total",
        "State",
        "Decay",
        "Moments",
        "MergeArgs",
        "ForwardArgs",
        "BackwardArgs",
        "TargetFormat",
        "TokenForwardArgs",
        "TokenKl",
        "FullForwardArgs",
        "SumsArgs",
        "PassArgs",
        "Divisor",
        "CountArgs",
        "ScaleArgs",
        "PpoStats",
        "RuleArgs",
        "RejectionArgs",
        "CorrectionStats",
    ] {
        assert!(compared.iter().any(|seen| seen == name), "{name} was not compared");
    }
}

/// The value of an expression of numbers and constants.
fn value(expression: &Expr, constants: &BTreeMap<String, Expr>) -> Option<i64> {
    match expression {
        Expr::Lit(literal) => match &literal.lit {
            syn::Lit::Int(number) => number.base10_parse().ok(),
            _ => None,
        },
        Expr::Path(path) => value(constants.get(&path.path.get_ident()?.to_string())?, constants),
        Expr::Paren(inner) => value(&inner.expr, constants),
        Expr::Cast(inner) => value(&inner.expr, constants),
        Expr::Binary(binary) => {
            let (a, b) = (value(&binary.left, constants)?, value(&binary.right, constants)?);
            match binary.op {
                syn::BinOp::Add(_) => Some(a + b),
                syn::BinOp::Sub(_) => Some(a - b),
                syn::BinOp::Mul(_) => Some(a * b),
                syn::BinOp::Div(_) => Some(a / b),
                syn::BinOp::Shl(_) => Some(a << b),
                _ => None,
            }
        }
        _ => None,
    }
}

#[test]
fn constants_of_one_name_have_one_value() {
    let mut compared = Vec::new();
    for op in ops() {
        let rust = rust_constants(&rust_files(&op));
        // Their expressions are Rust as well, but for the width of a vector of floats.
        let texts = cuda_constants(&cuda_source(&format!("kernels/{op}.cu")));
        let cuda: BTreeMap<String, Expr> = texts
            .iter()
            .filter_map(|(name, text)| {
                let text = text.replace("WIDTH<float>", "(16 / 4)");
                Some((name.clone(), syn::parse_str(&text).ok()?))
            })
            .collect();
        for (name, ours) in &rust {
            if let Some(theirs) = cuda.get(name) {
                let (ours, theirs) = (value(ours, &rust), value(theirs, &cuda));
                assert!(ours.is_some(), "{op}: {name} in Rust is no number");
                assert_eq!(ours, theirs, "{op}: {name}, in Rust and in CUDA");
                compared.push(format!("{op} {name}"));
            }
        }
    }
    for name in [
        "correction PARTIAL_SUMS",
        "gae SEGMENT",
        "gae THREAD_TOKENS",
        "gae MAX_THREADS",
        "logprob WARP",
        "ppo_loss PARTIAL_SUMS",
    ] {
        assert!(compared.iter().any(|seen| seen == name), "{name} was not compared");
    }
}

#[test]
fn enums_of_one_name_have_the_same_values() {
    let declared = Regex::new(r"enum class (\w+) : int32_t \{([^}]*)\}").unwrap();
    let plain = |name: &str| name.replace('_', "").trim().to_lowercase();
    let mut compared = Vec::new();
    for op in ops() {
        let source = cuda_source(&format!("kernels/{op}.cu"));
        for found in declared.captures_iter(&source) {
            let theirs: Vec<String> = found[2].split(',').map(plain).collect();
            // An op with many options has them in a file of their own.
            let files = ops()
                .into_iter()
                .flat_map(|op| ["mod", "options"].map(|file| format!("src/{op}/{file}.rs")));
            let ours = files.filter(|file| fs::exists(file).unwrap()).find_map(|file| {
                let file = syn::parse_file(&read(&file)).expect("Rust");
                file.items.into_iter().find_map(|item| match item {
                    Item::Enum(item) if item.ident == found[1] => Some(item),
                    _ => None,
                })
            });
            let ours = ours.unwrap_or_else(|| panic!("no enum {} in Rust", &found[1]));
            let ours = ours.variants.iter().map(|variant| plain(&variant.ident.to_string()));
            assert_eq!(ours.collect::<Vec<_>>(), theirs, "{}, in Rust and in CUDA", &found[1]);
            compared.push(found[1].to_string());
        }
    }
    for name in ["Baseline", "KlEstimator", "RejectionMetric", "Scale", "Singleton", "WeightLevel"]
    {
        assert!(compared.iter().any(|seen| seen == name), "{name} was not compared");
    }
}

#[test]
fn a_difference_is_seen() {
    let fields = |body| cuda_fields(body);
    let want = [("const float*", "x"), ("float[N+1]", "y"), ("int32_t", "a"), ("int32_t", "b")];
    let want = want.map(|(kind, name)| (kind.to_string(), name.to_string()));
    assert_eq!(fields("const float* x;\n float y[N + 1]; int32_t a, b;"), want);
    for other in [
        "float* x; float y[N + 1]; int32_t a, b;",
        "const float* x; float y[N]; int32_t a, b;",
        "const float* x; float y[N + 1]; int32_t b, a;",
        "const float* x; float y[N + 1]; int32_t a; int64_t b;",
        "const float* x; float y[N + 1]; int32_t a;",
        "const float* x; float y[N + 1]; int32_t a, b, c;",
    ] {
        assert_ne!(fields(other), want);
    }
}
