#!/usr/bin/env bash
# A local Orbax checkpoint that is being copied into a bucket counts as complete
# before it is.
#
# In gs:// a step is complete for Orbax when it holds commit_success.txt, which a
# save there writes last; on a disk a rename says so. But orbax-checkpoint 0.12.8
# writes commit_success.txt into local steps as well. A recursive copy of such a
# folder takes the marker in the order of names, before `state/`: if the copy
# breaks off, the bucket has a step that Orbax lists as the latest one, and that
# cannot be loaded, where a save that broke off would be passed over. Leave the
# markers out of a copy, and copy that of the step last.
#
# Seen on Python 3.11, jax 0.10.2, gcsfs 2026.10.1, gcp-storage-emulator 2026.7.19:
# local marker True; listed in the bucket [4]; without the marker []; loading:
# an error.
set -euo pipefail
folder="$(mktemp -d)"
server=""
trap '[ -z "$server" ] || kill "$server" 2>/dev/null; rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv env
env/bin/pip install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 \
  gcsfs==2026.10.1 gcp-storage-emulator==2026.7.19 2>/dev/null

port="$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
export STORAGE_EMULATOR_HOST="http://127.0.0.1:$port"
export TENSORSTORE_GCS_HTTP_URL="http://127.0.0.1:$port"
export GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false EPATH_USE_TF=0 JAX_PLATFORMS=cpu
env/bin/gcp-storage-emulator start --host=127.0.0.1 --port="$port" \
  --in-memory --default-bucket=bucket >server.log 2>&1 &
server=$!

cat > show.py <<'PY'
import os, pathlib, subprocess, sys, time, urllib.request
import fsspec
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

for _ in range(100):
  try:
    urllib.request.urlopen(os.environ["STORAGE_EMULATOR_HOST"] + "/storage/v1/b")
    break
  except OSError:
    time.sleep(0.2)
local = pathlib.Path("run").absolute()
with ocp.training.Checkpointer(local) as checkpoints:
  checkpoints.save_checkpointables(
    4, {"data": {"x": jnp.ones(8)}, "state": {"x": jnp.ones(8)}}
  )
print("local marker", (local / "4" / "commit_success.txt").exists())
files = fsspec.filesystem("gs")
for path in sorted(p for p in (local / "4").rglob("*") if p.is_file()):
  name = path.relative_to(local).as_posix()
  if not name.startswith("4/state/"):  # Here the copy broke off.
    files.put_file(str(path), f"gs://bucket/run/{name}")


LIST = """
from orbax.checkpoint import v1 as ocp
with ocp.training.Checkpointer("gs://bucket/run") as checkpoints:
  print([c.step for c in checkpoints.checkpoints])
"""


def listed():  # By a new process, which has no listing of before.
  done = subprocess.run(
    [sys.executable, "-c", LIST], capture_output=True, text=True, check=True
  )
  return done.stdout.strip()


print("listed", listed())
with ocp.training.Checkpointer("gs://bucket/run") as checkpoints:
  try:
    checkpoints.load_checkpointables(4, {"state": None})
    print("loaded")
  except Exception as error:
    print("not loaded")
files.rm_file("gs://bucket/run/4/commit_success.txt")
print("without it", listed())
PY
seen="$(env/bin/python show.py 2>show.log | grep -E '^(local|listed|loaded|not|without)')"
echo "$seen"
[ "$seen" = "local marker True
listed [4]
not loaded
without it []" ] || { tail -5 show.log; echo "this is another behaviour"; exit 1; }
