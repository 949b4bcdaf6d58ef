#!/usr/bin/env bash
# Lets SAPIEN (the rms_* and ms_* tasks) render without a GPU: installs Mesa's Vulkan driver for the CPU and a layer of ours
# that removes an extension, which this driver may lack, from those SAPIEN requires. With NVIDIA's Vulkan driver neither
# is needed.
#
#   setup/vulkan/install.sh [FOLDER]    # the Python environment that will use it; default: .venv of the repository
#
# envs/maniskill.py enables the layer if it is installed in that environment.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd -P)
environment=${1:-${VIRTUAL_ENV:-$(dirname -- "$(dirname -- "$here")")/.venv}}
header=/usr/include/vulkan/vk_layer.h
packages=()
nvidia() { compgen -G '/etc/vulkan/icd.d/nvidia*' || compgen -G '/usr/share/vulkan/icd.d/nvidia*'; } >/dev/null

[[ $(/sbin/ldconfig -p) == *libvulkan.so.1* ]] || packages+=(libvulkan1)
if ! nvidia; then
  # Debian 12 ships 22.3, which SAPIEN rejects. Only this package comes from backports; the OpenGL drivers stay.
  release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  version=$(dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2>/dev/null || true)
  if ! dpkg --compare-versions "${version:-0}" ge 23; then
    packages+=("mesa-vulkan-drivers$([ "$release" != bookworm ] || echo /bookworm-backports)")
  fi
  [ -e "$header" ] || packages+=(libvulkan-dev)
  command -v gcc >/dev/null || packages+=(gcc libc6-dev)
fi
[ ${#packages[@]} -eq 0 ] || "$here/../install.sh" "${packages[@]}"
if nvidia; then
  exit 0
fi

if ! command -v gcc >/dev/null || [ ! -e "$header" ] || ! compgen -G '/usr/share/vulkan/icd.d/lvp_icd*' >/dev/null; then
  echo "Vulkan's CPU driver, or what the layer is built with, is missing, run: sudo $here/install.sh $environment" >&2
  exit 1
fi
layers=$environment/share/vulkan/explicit_layer.d
mkdir -p "$layers"
gcc -std=c11 -Wall -Wextra -Werror -O2 -shared -fPIC -fvisibility=hidden -o "$layers/libhrssm_layer.so" "$here/layer.c"
cp "$here/layer.json" "$layers/"
