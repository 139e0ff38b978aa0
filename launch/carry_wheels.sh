#!/usr/bin/env bash
# Wheels for a machine that reaches no package index: what this library needs and
# is not there, for that machine's Python, in a folder to carry.
#
#   launch/carry_wheels.sh wheels
#   PYTHON=3.13 HAS="jax==0.12.* flax" launch/carry_wheels.sh wheels
#
# PYTHON is the version of Python there, ARCH its processor. HAS names what is
# there, with versions as pip has them, where others would not fit together; what
# these bring with them is there too. The rest is chosen to go with their versions.
set -euo pipefail

python="${PYTHON:-3.12}"
arch="${ARCH:-x86_64}"
read -ra has <<<"${HAS:-jax==0.11.* flax optax orbax-checkpoint chex numpy \
tokenizers transformers}"
folder="${1:?give the folder to write to, for example wheels}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# pip takes a platform by its exact name: all that glibc 2.35 runs.
target=(--only-binary=:all: --implementation=cp --python-version="$python")
for minor in $(seq 5 35); do
  target+=(--platform="manylinux_2_${minor}_$arch")
done
for name in manylinux2014 manylinux2010 manylinux1; do
  target+=(--platform="${name}_$arch")
done

# resolve NAME REQUIREMENT...: writes "name==version" lines into $work/NAME.
resolve() {
  local name="$1"
  shift
  python3 -m pip install --quiet --dry-run --ignore-installed \
    --target="$work/none" --report="$work/$name.json" "${target[@]}" "$@"
  python3 - "$work/$name.json" >"$work/$name" <<'END'
import json, re, sys
for each in json.load(open(sys.argv[1]))["install"]:
  name = re.sub(r"[-_.]+", "-", each["metadata"]["name"]).lower()
  print(f"{name}=={each['metadata']['version']}")
END
}

python3 - "$here/pyproject.toml" >"$work/needs" <<'END'
import sys, tomllib
print(*tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"], sep="\n")
END

resolve there "${has[@]}"
resolve all --requirement="$work/needs" --constraint="$work/there"
grep -vxFf "$work/there" "$work/all" >"$work/missing" || true
mkdir -p "$folder"
if [[ -s "$work/missing" ]]; then
  python3 -m pip download --quiet --no-deps --dest="$folder" "${target[@]}" \
    --requirement="$work/missing"
fi
echo "$(wc -l <"$work/missing") wheels in $folder, $(du -sh "$folder" | cut -f1)," \
  "for Python $python:"
sed 's/^/  /' "$work/missing"
cat <<END
There, beside this repository, at its top:
  python3 -m pip install --no-index --no-deps --target=/tmp/site $folder/*.whl
  PYTHONPATH=/tmp/site python3 launch/device_check.py --minutes=12
END
