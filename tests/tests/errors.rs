//! All errors and findings that a user can see, as they stand in the sources, against the list in `tests/errors.md`: whoever changes a
//! word of one changes the list, where somebody reads it beside its neighbours. Tier `unit`. Not here: when an error comes (the
//! tests of what makes it), and how a whole one looks (the command's own tests).

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails there")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};
use syn::{
    Attribute, Expr, ExprCall, ExprMethodCall, ImplItemFn, Item, ItemEnum, ItemFn, ItemMod, ItemStruct, Lit,
    Local, Macro, Meta, Pat, Stmt,
};

/// What is only known when it happens.
const TOLD_THEN: &str = "{…}";

/// An error or finding.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Site {
    /// A reason, a check, a field or a variant; what it is known by.
    word: String,
    /// What went wrong, and why that matters where a finding says so.
    message: String,
    /// What to do, where the site says so itself.
    next: String,
}

#[derive(Default)]
struct Catalogue {
    sites: Vec<Site>,
    /// Constants of the file and variables of the function that are texts, as far as they are read.
    texts: BTreeMap<String, String>,
}

impl Catalogue {
    /// `Failure::new(Reason::X, …)` and its like.
    fn call(&self, call: &ExprCall) -> Option<Site> {
        let Expr::Path(path) = &*call.func else { return None };
        let path: Vec<String> = path.path.segments.iter().map(|part| part.ident.to_string()).collect();
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        let arguments: Vec<String> = call.args.iter().map(|argument| self.words(argument)).collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (word, message) = match (path.as_slice(), arguments.as_slice()) {
            // The agents have a reason, the command has a status code and a reason.
            ([.., "Failure", "new"], [reason, message]) => (*reason, (*message).to_owned()),
            ([.., "Failure", "new"], [_code, reason, message]) => (*reason, (*message).to_owned()),
            ([.., "Failure", "usage"], [reason, message]) => (*reason, (*message).to_owned()),
            ([.., "ParseError", "new"], [field, message, _]) => (*field, (*message).to_owned()),
            ([.., "ConfigError", "value"], [key, message]) => (*key, (*message).to_owned()),
            ([.., "Finding", "note" | "warning" | "error"], [check, found, why]) => {
                (*check, format!("{found}; {why}"))
            }
            _ => return None,
        };
        Some(Site { word: word.to_owned(), message, next: String::new() })
    }

    /// thiserror's `#[error("…")]`.
    fn told_by(&mut self, attributes: &[Attribute], word: &str) {
        for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("error")) {
            let Meta::List(list) = &attribute.meta else { continue };
            let template = list.tokens.clone().into_iter().next();
            let text = template.and_then(|token| syn::parse_str::<syn::LitStr>(&token.to_string()).ok());
            // `transparent` says what its source says.
            let Some(text) = text else { continue };
            self.sites.push(Site { word: word.to_owned(), message: text.value(), next: String::new() });
        }
    }

    /// The same with what is said after it: `.next(…)` of a failure, `.mend(…)` of a finding.
    fn chain(&self, expression: &Expr) -> Option<Site> {
        match expression {
            Expr::Call(call) => self.call(call),
            Expr::MethodCall(ExprMethodCall { receiver, method, args, .. }) => {
                let mut site = self.chain(receiver)?;
                if let (true, Some(said)) = (method == "next" || method == "mend", args.first()) {
                    site.next = self.words(said);
                }
                Some(site)
            }
            _ => None,
        }
    }

    /// What an expression says; several branches are joined.
    fn words(&self, expression: &Expr) -> String {
        let of_block = |block: &syn::Block| match block.stmts.last() {
            Some(Stmt::Expr(expression, None)) => self.words(expression),
            _ => TOLD_THEN.to_owned(),
        };
        match expression {
            Expr::Lit(literal) => match &literal.lit {
                Lit::Str(text) => text.value(),
                _ => TOLD_THEN.to_owned(),
            },
            Expr::Path(path) => {
                let name = path.path.segments.last().map(|part| part.ident.to_string()).unwrap_or_default();
                match self.texts.get(&name) {
                    Some(text) => text.clone(),
                    // Constants of other files and variants are named; a variable is not.
                    None if name.chars().next().is_some_and(char::is_lowercase) => TOLD_THEN.to_owned(),
                    None => name,
                }
            }
            Expr::Macro(one) => of_macro(&one.mac),
            Expr::Reference(inner) => self.words(&inner.expr),
            Expr::Paren(inner) => self.words(&inner.expr),
            Expr::Block(inner) => of_block(&inner.block),
            Expr::MethodCall(call)
                if matches!(call.method.to_string().as_str(), "to_owned" | "to_string" | "into") =>
            {
                self.words(&call.receiver)
            }
            Expr::If(branches) => {
                let other = branches
                    .else_branch
                    .as_ref()
                    .map_or_else(|| TOLD_THEN.to_owned(), |(_, other)| self.words(other));
                format!("{} / {other}", of_block(&branches.then_branch))
            }
            Expr::Match(branches) => {
                branches.arms.iter().map(|arm| self.words(&arm.body)).collect::<Vec<_>>().join(" / ")
            }
            _ => TOLD_THEN.to_owned(),
        }
    }
}

/// `format!("…")`: its template.
fn of_macro(one: &Macro) -> String {
    let template = one.tokens.clone().into_iter().next();
    template
        .and_then(|token| syn::parse_str::<syn::LitStr>(&token.to_string()).ok())
        .map_or_else(|| TOLD_THEN.to_owned(), |text| text.value())
}

fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) => list.path.is_ident("cfg") && list.tokens.to_string().contains("test"),
        _ => false,
    })
}

impl<'ast> Visit<'ast> for Catalogue {
    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        if !is_for_tests(&module.attrs) {
            visit::visit_item_mod(self, module);
        }
    }

    fn visit_item_fn(&mut self, function: &'ast ItemFn) {
        if !is_for_tests(&function.attrs) {
            let outside = self.texts.clone();
            visit::visit_item_fn(self, function);
            self.texts = outside;
        }
    }

    fn visit_impl_item_fn(&mut self, function: &'ast ImplItemFn) {
        let outside = self.texts.clone();
        visit::visit_impl_item_fn(self, function);
        self.texts = outside;
    }

    /// An error of an adapter that has one alone.
    fn visit_item_struct(&mut self, one: &'ast ItemStruct) {
        self.told_by(&one.attrs, &one.ident.to_string());
    }

    fn visit_local(&mut self, local: &'ast Local) {
        if let (Pat::Ident(name), Some(value)) = (&local.pat, &local.init) {
            let text = self.words(&value.expr);
            self.texts.insert(name.ident.to_string(), text);
        }
        visit::visit_local(self, local);
    }

    /// An adapter's errors, `#[error("…")]` of thiserror.
    fn visit_item_enum(&mut self, errors: &'ast ItemEnum) {
        for variant in &errors.variants {
            self.told_by(&variant.attrs, &format!("{}::{}", errors.ident, variant.ident));
        }
    }

    fn visit_expr(&mut self, expression: &'ast Expr) {
        let Some(site) = self.chain(expression) else { return visit::visit_expr(self, expression) };
        self.sites.push(site);
        // What is made within its arguments is another one; its own beginning is not.
        let mut inner = expression;
        loop {
            match inner {
                Expr::MethodCall(call) => {
                    call.args.iter().for_each(|argument| self.visit_expr(argument));
                    inner = &call.receiver;
                }
                Expr::Call(call) => return call.args.iter().for_each(|argument| self.visit_expr(argument)),
                _ => return,
            }
        }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// The sources that ship, by their path below the workspace.
fn sources() -> BTreeMap<String, String> {
    let mut sources = BTreeMap::new();
    let mut folders: Vec<PathBuf> = ["proto", "agent-core", "storage-agent", "compute-agent", "controller"]
        .map(|member| root().join(member).join("src"))
        .into();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root()).unwrap().display().to_string();
            if path.is_dir() {
                folders.push(path);
            } else if name.ends_with(".rs") && !name.ends_with("tests.rs") {
                sources.insert(name, fs::read_to_string(path).unwrap());
            }
        }
    }
    sources
}

fn all() -> BTreeMap<String, Vec<Site>> {
    let mut all = BTreeMap::new();
    for (name, source) in sources() {
        let file = syn::parse_file(&source).unwrap_or_else(|error| panic_with(&name, &error));
        let mut catalogue = Catalogue::default();
        for item in &file.items {
            if let Item::Const(constant) = item
                && let Expr::Lit(literal) = &*constant.expr
                && let Lit::Str(text) = &literal.lit
            {
                catalogue.texts.insert(constant.ident.to_string(), text.value());
            }
        }
        catalogue.visit_file(&file);
        catalogue.sites.sort();
        catalogue.sites.dedup();
        if !catalogue.sites.is_empty() {
            all.insert(name, catalogue.sites);
        }
    }
    all
}

#[expect(clippy::panic, reason = "a test that cannot go on fails there")]
fn panic_with(name: &str, error: &syn::Error) -> ! {
    panic!("{name}: {error}")
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ⏎ ")
}

#[test]
fn every_error_is_in_the_list_as_it_is_in_the_sources() {
    let mut text = "# Errors and findings\n\nWhat a user can be told, as it stands in the sources, but for what clap says of a command line; `{…}` is made elsewhere or known only then. Kept by the test \
                    `errors`. Where the last column is empty, what to do is that of the reason ([reference](../proto/reference.md#failures)), \
                    or of whatever the error becomes.\n"
        .to_owned();
    for (file, sites) in all() {
        write!(text, "\n## {file}\n\n| | what is told | what to do |\n|---|---|---|\n").unwrap();
        for Site { word, message, next } in sites {
            writeln!(text, "| {} | {} | {} |", cell(&word), cell(&message), cell(&next)).unwrap();
        }
    }
    let kept = fs::read_to_string(root().join("tests/errors.md")).unwrap_or_default();
    let fresh = Path::new(env!("CARGO_TARGET_TMPDIR")).join("errors.md");
    fs::write(&fresh, &text).unwrap();
    let lacks = |of: &str, line: &&str| !of.lines().any(|other| other == *line);
    let new = text.lines().filter(|line| lacks(&kept, line)).map(|line| format!("+ {line}"));
    let gone = kept.lines().filter(|line| lacks(&text, line)).map(|line| format!("- {line}"));
    let changed = gone.chain(new).collect::<Vec<_>>().join("\n");
    let path = fresh.display();
    assert!(kept == text, "read what has changed, and if it is right: cp {path} tests/errors.md\n{changed}");
}

/// What a message must be to be of use beside `error: attach tether/v1 to c2: …`.
#[test]
fn every_error_reads_as_the_end_of_a_sentence_and_says_something() {
    let mut bad = Vec::new();
    for (file, sites) in all() {
        for site in sites {
            let message = site.message.trim();
            // An adapter's error is told with its source.
            let says = site.word.contains("::")
                || message == TOLD_THEN
                || message.split_whitespace().count() >= 2
                || message.contains('{');
            let is_sentence = |text: &str| text.ends_with('.') && !text.ends_with("..");
            if !says || is_sentence(message) || is_sentence(&site.next) || message.starts_with("Error") {
                bad.push(format!("{file}: {site:?}"));
            }
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}
