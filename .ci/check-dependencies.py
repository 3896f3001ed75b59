#!/usr/bin/env python3
"""Checks every locked dependency: its licence against deny.toml's list, and its minimum Rust version against ours.

A stand-in for cargo-deny, which takes minutes to build. The minimum version is checked for what users compile (normal and build
dependencies, all features), not for what only our tests need.
"""
import json
import re
import subprocess
import sys
import tomllib

metadata = json.loads(subprocess.check_output(["cargo", "metadata", "--locked", "--all-features", "--format-version", "1"]))
packages = {p["id"]: p for p in metadata["packages"]}
nodes = {n["id"]: n for n in metadata["resolve"]["nodes"]}
with open("deny.toml", "rb") as f:
    allowed = set(tomllib.load(f)["licenses"]["allow"])

errors = []


def acceptable(expression):
    """Evaluates an SPDX expression ("A OR B", "(A OR B) AND C", the old "A/B") over the allowed licences."""
    python = []
    for word in re.findall(r"[()]|[^\s()/]+|/", expression):
        if word in "()":
            python.append(word)
        elif word in ("OR", "/"):
            python.append("or")
        elif word == "AND":
            python.append("and")
        else:
            python.append(str(word in allowed))
    return eval(" ".join(python))  # only parentheses, and, or, True, False are left


for p in packages.values():
    if not p["license"] or not acceptable(p["license"]):
        errors.append(f"{p['name']} {p['version']}: licence {p['license']!r} is not in deny.toml")
    if p["source"] not in (None, "registry+https://github.com/rust-lang/crates.io-index"):
        errors.append(f"{p['name']} {p['version']}: not from crates.io but {p['source']}")


def version(text):
    return tuple(int(part) for part in (text.split(".") + ["0", "0"])[:3])


root = metadata["resolve"]["root"]
msrv = packages[root]["rust_version"]
shipped, queue = set(), [root]
while queue:
    node = queue.pop()
    if node not in shipped:
        shipped.add(node)
        queue += [d["pkg"] for d in nodes[node]["deps"] if any(kind["kind"] != "dev" for kind in d["dep_kinds"])]
for p in (packages[i] for i in shipped):
    if p["rust_version"] and version(p["rust_version"]) > version(msrv):
        errors.append(f"{p['name']} {p['version']} needs Rust {p['rust_version']}, we promise {msrv}")

for e in errors:
    print(e, file=sys.stderr)
print(f"{len(packages)} packages, {len(shipped)} of them compiled by users, Rust {msrv}: {len(errors)} problems")
sys.exit(bool(errors))
