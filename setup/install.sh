#!/usr/bin/env bash
# Installs the system libraries that MuJoCo needs to render without a display (Debian, Ubuntu), and the packages given as
# arguments. Skips what is already installed. Without permission to install, it prints the command to run and exits
# with success: setup/doctor.py and training report what is missing.
set -euo pipefail

packages=("$@")
libraries=$(/sbin/ldconfig -p)
loadable() { [[ $libraries == *"$1"* ]]; }

# EGL, on the GPU or the CPU, is sufficient.
if ! loadable libEGL.so.1 || ! loadable libGL.so.1 || ! { loadable libEGL_mesa.so || loadable libEGL_nvidia.so; }; then
  packages+=(libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri)
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  as_root=(sudo -n)
  if ! sudo -n true 2>/dev/null; then
    [ ${#packages[@]} -eq 0 ] ||
      echo "system packages are missing, run: sudo apt-get update && sudo apt-get install -y ${packages[*]}" >&2
    exit 0
  fi
fi
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@" >/dev/null; }

if [[ "${packages[*]}" == *-backports* ]] && ! apt-cache policy | grep -q -e -backports; then
  release=$(. /etc/os-release && echo "$VERSION_CODENAME")
  mirror=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $release" 'Created-By: Packages' | sed -n 1p)
  echo "deb $mirror $release-backports main" |
    "${as_root[@]}" tee "/etc/apt/sources.list.d/$release-backports.list" >/dev/null
fi
if [ ${#packages[@]} -gt 0 ] || ! loadable libOSMesa.so; then
  apt update || true # a package list that fails to load may not be needed
fi
if [ ${#packages[@]} -gt 0 ]; then
  apt install -y --no-install-recommends "${packages[@]}" ||
    echo "could not install system packages, run: sudo apt-get install -y ${packages[*]}" >&2
fi
# OSMesa, on the CPU, is the fallback if EGL fails. The newest releases no longer package it.
loadable libOSMesa.so || apt install -y --no-install-recommends libosmesa6 ||
  echo "OSMesa is not available: rendering needs EGL" >&2
