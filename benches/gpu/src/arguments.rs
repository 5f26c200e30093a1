//! What the program is asked for.

/// What is printed when it is asked for something else.
pub const USAGE: &str = "\
time [OPTIONS] [NAME]

Measures the CUDA kernels on the first GPU.

NAME            part of a pass's name, such as `KL forward`: no others are measured
--bf16          logits of this type; several may be given, and without any all are measured
--f16           likewise
--f32           likewise, and the ops on tokens, whose values are f32
--wide          takes the parts of a long row of logits side by side, however many rows there are
--narrow        takes them one after the other
--device        only says which device this is, and how fast it copies
--help          prints this";

#[derive(Debug, Default, PartialEq)]
pub struct Arguments {
    /// Part of a pass's name, or nothing.
    pub name: String,
    /// The types that are measured: all of them if none is here.
    pub dtypes: Vec<&'static str>,
    /// Whether the parts of a long row are taken side by side; by the number of rows if not said.
    pub wide: Option<bool>,
    /// Whether nothing but the device is looked at.
    pub device_only: bool,
    /// Whether usage is asked for.
    pub help: bool,
}

impl Arguments {
    /// # Errors
    /// Says what is not understood.
    pub fn parse(given: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut arguments = Self::default();
        for argument in given {
            let option = argument.as_str();
            match option {
                "--bf16" => arguments.dtypes.push("bf16"),
                "--f16" => arguments.dtypes.push("f16"),
                "--f32" => arguments.dtypes.push("f32"),
                "--wide" => arguments.wide = Some(true),
                "--narrow" => arguments.wide = Some(false),
                "--device" => arguments.device_only = true,
                "--help" | "-h" => arguments.help = true,
                _ if option.starts_with('-') => return Err(format!("there is no option {option}")),
                _ if !arguments.name.is_empty() => {
                    let name = &arguments.name;
                    return Err(format!(
                        "two names, `{name}` and `{option}`: quote what has spaces"
                    ));
                }
                _ => arguments.name = option.into(),
            }
        }
        Ok(arguments)
    }

    /// Whether a pass of that name and type is measured.
    pub fn wants(&self, pass: &str, dtype: &str) -> bool {
        let typed = self.dtypes.is_empty() || self.dtypes.contains(&dtype);
        !self.device_only && typed && pass.contains(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::Arguments;

    fn parse(line: &str) -> Result<Arguments, String> {
        // A space within an argument is written as _.
        let words = line.split(' ').filter(|word| !word.is_empty());
        Arguments::parse(words.map(|word| word.replace('_', " ")))
    }

    #[test]
    fn nothing_asks_for_everything() {
        let all = parse("").unwrap();
        assert_eq!(all, Arguments::default());
        for dtype in ["bf16", "f16", "f32"] {
            assert!(all.wants("GAE", dtype));
        }
    }

    #[test]
    fn types_add_up() {
        let two = parse("--bf16 --f32").unwrap();
        assert_eq!(two.dtypes, ["bf16", "f32"]);
        assert!(two.wants("GAE", "f32") && two.wants("logprob forward", "bf16"));
        assert!(!two.wants("logprob forward", "f16"));
        assert_eq!(parse("--f16").unwrap().dtypes, ["f16"]);
    }

    #[test]
    fn a_name_selects_passes_that_contain_it() {
        let some = parse("KL_forward --bf16").unwrap();
        assert!(some.wants("exact KL forward", "bf16"));
        assert!(!some.wants("exact KL backward", "bf16") && !some.wants("exact KL forward", "f32"));
        let error = parse("KL forward").unwrap_err();
        assert!(error.contains("`KL` and `forward`"), "{error}");
    }

    #[test]
    fn switches_are_off_unless_given() {
        let plain = parse("--bf16").unwrap();
        assert!(plain.wide.is_none() && !plain.device_only && !plain.help);
        assert_eq!(parse("--wide").unwrap().wide, Some(true));
        assert_eq!(parse("--narrow").unwrap().wide, Some(false));
        assert!(parse("--help").unwrap().help && parse("-h").unwrap().help);
        let device = parse("--device").unwrap();
        assert!(device.device_only && !device.wants("GAE", "f32"));
    }

    #[test]
    fn what_is_unknown_is_named() {
        for line in ["--fp32", "-x", "--wider", "--bf16=1"] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(line), "{line}: {error}");
        }
    }
}
