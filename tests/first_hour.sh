#!/usr/bin/env bash
# A stranger's first hour with tdpass, played and timed: a wheel in an empty environment without a compiler, then
# every way in that the documentation names. Prints a table of times and writes it to times.csv in the folder; exits
# with 1 where a step failed. `python -m benchmarks.first_hour` plays it and keeps the times.
#
#   tests/first_hour.sh [FOLDER]
#
# FIRST_HOUR_PACKAGES=/path/to/site-packages takes torch and all else from there instead of the package registry.
# FIRST_HOUR_CONSTRAINTS=FILE holds packages to other versions than constraints.txt; an empty one holds them to none.
# A step whose library is not there is left out, and the table says so.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=${1:-$(mktemp -d)}
mkdir -p "$work/tools" && cd "$work" || exit 1
python=${PYTHON:-python3}
constraints=${FIRST_HOUR_CONSTRAINTS-$root/constraints.txt}
failed=0
unset PYTHONPATH  # what is found there would count as installed
echo step,seconds,result >times.csv

# step NAME COMMAND...: run it, keep its output in NAME.log, and note what it took
step() {
  local name=$1 started=$SECONDS word=ok
  shift
  if ! "$@" >"$name.log" 2>&1; then
    word=FAILED failed=1
    echo "--- $name" && tail -n 15 "$name.log"
  fi
  echo "$name,$((SECONDS - started)),$word" >>times.csv
}

# with MODULE NAME COMMAND...: a step that needs a library
with() {
  local module=$1 name=$2
  shift
  if bare python -c "import $module" >/dev/null 2>&1; then step "$@"; else
    echo "$name,,left out: $module does not import" >>times.csv
  fi
}

# A path without a compiler, and an environment without anything that was set up for development.
for tool in bash env uname ldconfig rm mkdir ls cat; do ln -sf "$(command -v $tool || echo /bin/$tool)" "tools/$tool"; done
bare() {
  env -i HOME="$work" TMPDIR="${TMPDIR:-/tmp}" LANG=C.UTF-8 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TDPASS_CACHE="$work/cache" \
    TDPASS_KERNELS="$work/kernels" TRANSFORMERS_OFFLINE=1 PATH="$work/env/bin:$work/tools" "$@"
}

empty_environment() {
  "$python" -m venv env
  TDPASS_WHEEL=pure "$python" -m pip --disable-pip-version-check wheel -q --no-deps -w wheel "$root" || return 1
  if [ -n "${FIRST_HOUR_PACKAGES:-}" ]; then
    # in front of what is found there stands the wheel: an editable tdpass may be among it
    env/bin/python -m pip --disable-pip-version-check install -q --no-deps wheel/tdpass-*.whl
    echo "import sys; sys.path.append('$FIRST_HOUR_PACKAGES')" >"$(env/bin/python -c 'import site; print(site.getsitepackages()[0])')/zz.pth"
  else
    env/bin/python -m pip --disable-pip-version-check install -q ${constraints:+-c "$constraints"} wheel/tdpass-*.whl \
      onnxscript scikit-learn pillow transformers timm nbclient nbformat ipykernel
    # a torchvision that was built for another torch breaks transformers too
    env/bin/python -c 'import torchvision' 2>/dev/null || env/bin/python -m pip uninstall -q -y torchvision timm
  fi
  ! bare bash -c 'command -v cc c++ gcc g++ clang' && bare python -c 'import tdpass, sys; print(tdpass.__file__); sys.exit("env" not in tdpass.__file__)'
}

notebook() {
  bare python - "$root/examples/tour.ipynb" <<'EOF'
import sys
import nbformat
from nbclient import NotebookClient

book = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(book, timeout=600, kernel_name="python3").execute()
shown = [output.data for cell in book.cells if cell.cell_type == "code" for output in cell.outputs if "data" in output]
assert any("text/html" in data for data in shown), "the artifact shows no report"
EOF
}

step wheel_in_an_empty_environment empty_environment
step doctor bare tdpass doctor
step own_network bare python "$root/examples/own_cnn.py"
with timm network_of_timm bare python "$root/examples/timm_net.py"
with transformers bert_and_hugging_face bare python "$root/examples/bert.py"
with onnxscript onnx_of_batch_one bare python "$root/examples/onnx_batch_of_one.py"
step command_line bare tdpass compress zoo:digits_net --budget macs=0.5 --input 64x1x8x8 --effort fast --no-strict -o small.safetensors
with nbclient notebook notebook
step recipe_on_digits bare tdpass train lenet5_svd_training --data digits --folder run --set control=false --set method.svd-training.factored=1 --set method.svd-training.sparsify=1 --set method.svd-training.tune=1 --set finetune=1

echo "all,$SECONDS,$([ $failed = 0 ] && echo ok || echo FAILED)" >>times.csv
while IFS=, read -r name seconds word; do printf '%-34s %7s  %s\n' "$name" "$seconds" "$word"; done <times.csv
echo "in $work"
exit $failed
