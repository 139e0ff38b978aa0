#!/usr/bin/env bash
# Wheels for a machine that reaches no package index: what this library needs and
# is not there, for that machine's Python, in a folder to carry.
#
#   launch/carry_wheels.sh wheels
#   PYTHON=3.13 HAS="jax==0.12.* flax optax" launch/carry_wheels.sh wheels
#
# PYTHON is the version of Python there, ARCH its processor. HAS names what is
# there, with versions where they matter: what these bring with them is there too,
# and the rest is chosen to go with their versions. Torch and transformers bring
# nothing large that is needed.
set -euo pipefail

python="${PYTHON:-3.12}"
arch="${ARCH:-x86_64}"
read -ra has <<<"${HAS:-jax==0.11.* flax optax orbax-checkpoint chex numpy \
tokenizers}"
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

# wheels FOLDER REQUIREMENT...: downloads them and what they need.
wheels() {
  local to="$1"
  shift
  python3 -m pip download --quiet --dest="$to" "${target[@]}" "$@"
}

python3 - "$here/pyproject.toml" >"$work/needs.txt" <<'END'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
  print(*tomllib.load(file)["project"]["dependencies"], sep="\n")
END

echo "what is there, to know what is not ..." >&2
wheels "$work/there" "${has[@]}"
(cd "$work/there" && printf '%s\n' *.whl) |
  sed -E 's/^([^-]+)-([^-]+)-.*/\1==\2/' >"$work/there.txt"
echo "what is needed ..." >&2
wheels "$work/all" --find-links="$work/there" --constraint="$work/there.txt" \
  --requirement="$work/needs.txt"

mkdir -p "$folder"
for wheel in "$work"/all/*.whl; do
  name="$(basename "$wheel")"
  [[ -e "$work/there/$name" ]] || mv "$wheel" "$folder/$name"
done
echo "in $folder, $(du -sh "$folder" | cut -f1), for Python $python:"
(cd "$folder" && printf '  %s\n' *.whl)
cat <<END
There, beside this repository, at its top:
  python3 -m pip install --no-index --no-deps --target=site $folder/*.whl
  PYTHONPATH=site python3 launch/device_check.py --minutes=12
END
