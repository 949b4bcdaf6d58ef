#!/usr/bin/env bash
# Installs the system libraries with which MuJoCo renders without a screen (Debian, Ubuntu), and the packages named as
# arguments. What is there already is left alone. Where it cannot install, it prints the one command to run and goes on:
# setup/doctor.py and the training command say later what is missing.
set -euo pipefail

packages=("$@")
libraries=$(/sbin/ldconfig -p)
loadable() { [[ $libraries == *"$1"* ]]; }

# EGL renders on the GPU or the CPU and is enough.
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
  apt update || true # a list that fails to load need not be one that is needed
fi
if [ ${#packages[@]} -gt 0 ]; then
  apt install -y --no-install-recommends "${packages[@]}" ||
    echo "could not install system packages, run: sudo apt-get install -y ${packages[*]}" >&2
fi
# OSMesa, on the CPU, is the fallback where EGL fails. The newest releases have it no more.
loadable libOSMesa.so || apt install -y --no-install-recommends libosmesa6 ||
  echo "no OSMesa here: rendering needs EGL" >&2
