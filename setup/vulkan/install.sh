#!/usr/bin/env bash
# Lets SAPIEN (the rms_* and ms_* tasks) render without a GPU: Mesa's CPU driver for Vulkan, and our layer, which takes a
# request off SAPIEN's list that this driver cannot fulfil. Where a driver of NVIDIA is installed nothing is done.
#
#   setup/vulkan/install.sh [FOLDER]    # the Python environment that will use it; default: .venv of the repository
#
# envs/maniskill.py enables the layer when it finds it there.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd -P)
target=${1:-${VIRTUAL_ENV:-$(dirname -- "$(dirname -- "$here")")/.venv}}/share/vulkan/explicit_layer.d
packages=()
libraries=$(/sbin/ldconfig -p)
[[ $libraries == *libvulkan.so.1* ]] || packages+=(libvulkan1)
if ! compgen -G '/etc/vulkan/icd.d/nvidia*' >/dev/null && ! compgen -G '/usr/share/vulkan/icd.d/nvidia*' >/dev/null; then
  # Debian 12 itself has 22.3, which SAPIEN refuses. Alone from the backports: the drivers for OpenGL stay as they are.
  release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  version=$(dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2>/dev/null || true)
  if ! dpkg --compare-versions "${version:-0}" ge 23; then
    [ "$release" = bookworm ] && packages+=(mesa-vulkan-drivers/bookworm-backports) || packages+=(mesa-vulkan-drivers)
  fi
  [ -e /usr/include/vulkan/vk_layer.h ] || packages+=(libvulkan-dev)
  command -v gcc >/dev/null || packages+=(gcc libc6-dev)
fi
[ ${#packages[@]} -eq 0 ] || "$here/../install.sh" "${packages[@]}"

if compgen -G '/usr/share/vulkan/icd.d/lvp_icd*' >/dev/null; then
  mkdir -p "$target"
  gcc -std=c11 -Wall -Wextra -Werror -O2 -shared -fPIC -fvisibility=hidden -o "$target/libhrssm_layer.so" "$here/layer.c"
  cp "$here/layer.json" "$target/"
fi
