"""The scripts repeat their plumbing on purpose; this says where the copies differ, or mends them.

    python tests/copies.py          # list the differences, exit status 1 if there are any
    python tests/copies.py --fix    # write the text of the reference into the other scripts

Below the banner, all scripts have the same functions in the same order. What has one name, there
or above it, has one text. The reference is 4_Residual_Network/ResNet_keras.py, or the first script
that has the name.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "4_Residual_Network" / "ResNet_keras.py"
OTHERS = {*ROOT.glob("[1-8]_*/*_keras.py"), *ROOT.glob("htd/ResNet.py")} - {REFERENCE}
SCRIPTS = [REFERENCE, *sorted(OTHERS)]
BANNER = "training (from here on, all scripts have the same text)"
# Above the banner: what every script has of its own, and what these have of their own.
LESSONS = {"KERNEL", "scheduler", "parse_args", "build_network", "lenet"}
OWN_LESSONS = {
    "augment": ("LeNet_keras.py", "LeNet_dp_keras.py", "Wide_ResNet_keras.py"),
    "conv": ("DenseNet_keras.py",),  # which has no strides
    "imports": ("ResNet.py",),  # math, for the cosine and the tangent
}
# Below it: the learning rate of htd's script changes in every step, too, and that is its lesson.
EXCEPTIONS = {"learning_rate_callback": ("ResNet.py",)}


def blocks(source):
    """Return {name: (first line, line after the last)} of a script's top-level parts."""
    found, imports = {}, []
    for node in ast.parse(source).body[1:]:  # the first is the docstring
        span = (node.lineno - 1, node.end_lineno)
        if isinstance(node, ast.FunctionDef):
            found[node.name] = span
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = span
        elif isinstance(node, ast.If) and found:
            found["__main__"] = span
        elif found:  # --fix would take it, and all before it, for imports
            sys.exit(f"no name to compare this part of a script by: {ast.unparse(node):.60}")
        else:
            imports.append(span)
    found["imports"] = (imports[0][0], imports[-1][1])
    return found


def is_lesson(name, script):
    """Whether this block of this script may differ from the reference."""
    own = (OWN_LESSONS | EXCEPTIONS).get(name, ())
    return name in LESSONS or script.name in own


def below_banner(script):
    """Return the names of the parts below a script's banner, in their order, but for exceptions."""
    source = script.read_text()
    banner = next(i for i, line in enumerate(source.splitlines()) if line.endswith(BANNER))
    every = [name for name, (start, _) in blocks(source).items() if start > banner]
    return [name for name in every if name not in EXCEPTIONS]


def differences(scripts=SCRIPTS, fix=False):
    """Return "script: name" for every block that differs from its reference; mend it on demand."""
    reference, found = {}, []
    for script in scripts:
        lines = script.read_text().splitlines()
        # From the last to the first, so that the spans of those to come stay right.
        for name, (start, end) in sorted(blocks("\n".join(lines)).items(), key=lambda b: -b[1][0]):
            if is_lesson(name, script):
                continue
            text = reference.setdefault(name, lines[start:end])
            if lines[start:end] != text:
                found.append(f"{script.name}: {name}")
                lines[start:end] = text
        if below_banner(script) != below_banner(REFERENCE):
            found.append(f"{script.name}: other parts, or in another order, below the banner")
        if fix:
            script.write_text("\n".join(lines) + "\n")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fix", action="store_true", help="write the reference's text over them")
    fix = parser.parse_args().fix
    found = differences(fix=fix)
    print("\n".join(found) or "All copies agree.")
    sys.exit(bool(differences() if fix else found))
