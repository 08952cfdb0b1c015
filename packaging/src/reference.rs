//! The reference of the gRPC API and of all failures, in Markdown, from the comments in the .proto files and in the table of
//! reasons. It is kept in the tree as `proto/reference.md`; a test says when it is not up to date.

use std::collections::HashMap;
use std::fmt::Write;

use anyhow::Context;
use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
};
use tether_agent_core::failure::Reason;

/// Its name in the folder that is written.
pub(crate) const FILE: &str = "reference.md";

const PACKAGE: &str = "tether.v1";

/// All of it.
///
/// # Errors
/// When the descriptors cannot be read.
pub(crate) fn markdown() -> anyhow::Result<String> {
    let set = FileDescriptorSet::decode(tether_proto::FILE_DESCRIPTOR_SET).context("the descriptors")?;
    let files: Vec<File<'_>> =
        set.file.iter().filter(|file| file.package() == PACKAGE).map(File::new).collect();
    let mut text = format!(
        "# Reference of the API `{PACKAGE}`\n\nWritten by `tether-manual` from the comments in [the .proto files](proto/tether/v1) and from the table \
         of reasons. Sizes are bytes; times say their unit.\n\n"
    );
    for file in &files {
        file.services(&mut text)?;
    }
    failures(&mut text)?;
    for file in &files {
        file.types(&mut text)?;
    }
    Ok(text)
}

/// What each reason means, and what to do.
fn failures(text: &mut String) -> anyhow::Result<()> {
    text.push_str(
        "## Failures\n\nEach failure is a gRPC status with a `google.rpc.ErrorInfo` of the domain `tether`: `reason` is one of these, and its metadata \
         has `step` and `next`, what to do, more exactly than here where the agent knows more. Where the same call may succeed later \
         with nobody doing anything, there is a `google.rpc.RetryInfo`.\n\n\
         | reason | status | retry after | what it means | what to do |\n|---|---|---|---|---|\n",
    );
    for reason in Reason::ALL {
        let retry = reason.retry_after().map_or_else(|| "-".to_owned(), |seconds| format!("{seconds} s"));
        writeln!(
            text,
            "| `{}` | {:?} | {retry} | {} | {} |",
            reason.as_str(),
            reason.code(),
            cell(reason.meaning()),
            cell(reason.next())
        )?;
    }
    text.push('\n');
    Ok(())
}

/// A .proto file, with its comments by their place (descriptor.proto, `SourceCodeInfo.Location.path`).
struct File<'a> {
    file: &'a FileDescriptorProto,
    comments: HashMap<&'a [i32], &'a str>,
}

impl<'a> File<'a> {
    fn new(file: &'a FileDescriptorProto) -> Self {
        let locations = file.source_code_info.iter().flat_map(|info| &info.location);
        let comments = locations
            .map(|location| (location.path.as_slice(), location.leading_comments()))
            .filter(|(_, comment)| !comment.is_empty())
            .collect();
        Self { file, comments }
    }

    /// One paragraph.
    fn comment(&self, path: &[i32]) -> String {
        let comment = self.comments.get(path).copied().unwrap_or_default();
        comment.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    fn services(&self, text: &mut String) -> anyhow::Result<()> {
        for (place, service) in (0..).zip(&self.file.service) {
            writeln!(text, "## Service `{}`\n\n{}\n", service.name(), self.comment(&[6, place]))?;
            for (number, method) in (0..).zip(&service.method) {
                let stream = if method.server_streaming() { "stream of " } else { "" };
                writeln!(
                    text,
                    "### {}.{}\n\n{} → {stream}{}\n\n{}\n",
                    service.name(),
                    method.name(),
                    link(method.input_type()),
                    link(method.output_type()),
                    self.comment(&[6, place, 2, number])
                )?;
            }
        }
        Ok(())
    }

    fn types(&self, text: &mut String) -> anyhow::Result<()> {
        for (place, message) in (0..).zip(&self.file.message_type) {
            self.message(text, message, &[4, place])?;
        }
        for (place, values) in (0..).zip(&self.file.enum_type) {
            self.values(text, values, &[5, place])?;
        }
        Ok(())
    }

    fn message(&self, text: &mut String, message: &DescriptorProto, path: &[i32]) -> anyhow::Result<()> {
        writeln!(text, "## {}\n", message.name())?;
        let comment = self.comment(path);
        if !comment.is_empty() {
            writeln!(text, "{comment}\n")?;
        }
        if !message.field.is_empty() {
            text.push_str("| field | type | |\n|---|---|---|\n");
        }
        for (number, field) in (0..).zip(&message.field) {
            let comment = self.comment(&[path, &[2, number]].concat());
            let one_of = field.oneof_index.filter(|_| !field.proto3_optional());
            let one_of = one_of.and_then(|index| message.oneof_decl.get(usize::try_from(index).ok()?));
            let one_of = one_of.map(|one| format!("One of `{}`. ", one.name())).unwrap_or_default();
            writeln!(
                text,
                "| `{}` = {} | {} | {one_of}{} |",
                field.name(),
                field.number(),
                type_of(message, field),
                cell(&comment)
            )?;
        }
        if !message.field.is_empty() {
            text.push('\n');
        }
        Ok(())
    }

    fn values(&self, text: &mut String, values: &EnumDescriptorProto, path: &[i32]) -> anyhow::Result<()> {
        writeln!(text, "## {}\n\n{}\n\n| value | |\n|---|---|", values.name(), self.comment(path))?;
        for (number, value) in (0..).zip(&values.value) {
            let comment = self.comment(&[path, &[2, number]].concat());
            writeln!(text, "| `{}` = {} | {} |", value.name(), value.number(), cell(&comment))?;
        }
        text.push('\n');
        Ok(())
    }
}

fn type_of(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let nested =
        message.nested_type.iter().find(|nested| field.type_name().ends_with(&format!(".{}", nested.name())));
    if let Some(map) =
        nested.filter(|nested| nested.options.as_ref().is_some_and(|options| options.map_entry()))
    {
        let part = |index: usize| map.field.get(index).map(|field| type_of(map, field)).unwrap_or_default();
        return format!("map of {} to {}", part(0), part(1));
    }
    let kind = match field.r#type() {
        Type::Message | Type::Enum => link(field.type_name()),
        scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    };
    match field.label() {
        Label::Repeated => format!("repeated {kind}"),
        _ if field.proto3_optional() => format!("optional {kind}"),
        _ => kind,
    }
}

/// A type of ours as a link to its section, any other by its name.
fn link(name: &str) -> String {
    let name = name.trim_start_matches('.');
    match name.strip_prefix(PACKAGE).and_then(|rest| rest.strip_prefix('.')) {
        Some(ours) => format!("[{ours}](#{})", ours.to_lowercase()),
        None => name.to_owned(),
    }
}

/// Text that does not end a table's cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_in_the_tree_is_up_to_date() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto/reference.md");
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            kept == markdown().unwrap(),
            "{} is not: cargo run -p tether-packaging -- FOLDER writes it anew, to FOLDER/{FILE}",
            path.display()
        );
    }

    #[test]
    fn every_rpc_message_field_and_value_says_what_it_is() {
        let text = markdown().unwrap();
        let silent: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("| `") && (line.ends_with("|  |") || line.ends_with("| |")))
            .collect();
        assert!(silent.is_empty(), "without a comment: {silent:#?}");
        assert!(text.contains("### StorageAgent.Export\n") && text.contains("`GUEST_HOLDS_DEVICE`"));
    }
}
