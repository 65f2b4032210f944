#!/usr/bin/env bash
# Pack into .gpu/ what a machine with a GPU and without a network needs to run
# scripts/benchmark_gpu.py, upstream, FastSegmentator and tests/cuda. Run on a machine that reaches
# PyPI:
#
#     scripts/pack_for_gpu.sh                  # for Python 3.12; PACK_PYTHON=3.11 for another version
#
# Then copy the checkout with .gpu/ to the machine with the GPU, and run there:
#
#     bash .gpu/run.sh 480 [STEP ...]          # results in $OUT, default gpu-results/
#
# That machine needs Linux on x86-64 and Python with torch, numpy, scipy, numba, pandas, scikit-image,
# scikit-learn and matplotlib, which are too large to be packed (llvmlite alone has 56 MB). SimpleITK and
# imagecodecs are replaced by empty modules for the same reason: the benchmark reads NIfTI only.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${PACK_PYTHON:-3.12}
pip=${PIP:-"python3 -m pip"}
packed=.gpu
rm -rf "$packed"
mkdir -p "$packed/wheels" "$packed/if-missing" "$packed/stubs/SimpleITK" "$packed/stubs/imagecodecs"

# Compared with each other, so their versions are fixed: these replace what the machine has.
programs=(nnunetv2==2.8.1 TotalSegmentator==2.18.0 acvl_utils==0.2.6 batchgenerators==0.25.5
    batchgeneratorsv2==0.3.6 dynamic_network_architectures==0.4.4 dicom2nifti==2.6.2
    fastsegmentator==0.1.1 nibabel==5.4.2)
# Installed only where the machine does not have them.
pure=(pydicom==3.0.2 xmltodict==1.0.4 yacs==0.1.8 graphviz==0.21 unittest2==1.1.0 einops platformdirs
    filelock requests urllib3 certifi idna tqdm pytest pluggy iniconfig packaging sortedcontainers
    attrs typing_extensions seaborn timm==1.0.22 pygments httpx httpcore h11 anyio six)
compiled=(blosc2==4.14.1 ndindex==1.10.1 numexpr==2.14.2 connected-components-3d==4.1.1 isal==1.9.1
    blosc==1.11.4 cucim-cu13==26.10.0 psutil charset-normalizer pyyaml msgpack
    hypothesis)

$pip wheel -q --no-deps -w "$packed/wheels" . "${programs[@]}"
$pip wheel -q --no-deps -w "$packed/if-missing" "${pure[@]}"
platforms=()
for glibc in 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done
$pip download -q --no-deps -d "$packed/if-missing" --python-version "$version" \
    --implementation cp --only-binary=:all: "${platforms[@]}" --platform manylinux2014_x86_64 \
    --platform manylinux1_x86_64 "${compiled[@]}"

echo '"""Replaces SimpleITK where only NIfTI is read."""


class Image: ...' > "$packed/stubs/SimpleITK/__init__.py"
echo '"""Replaces imagecodecs where no compressed DICOM file is read."""' \
    > "$packed/stubs/imagecodecs/__init__.py"
cp scripts/gpu/run.sh scripts/gpu/missing.py "$packed/"
du -sh "$packed"
