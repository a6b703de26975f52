#!/bin/bash
# Install kata-shim for a system's containerd, or take it away again: install.sh install|uninstall.
#
# What goes where (all below $DESTDIR):
#   $PREFIX/venv                                          the shim and what it imports, locked versions
#   $PREFIX/share/kata-containers/                        the guest: vmlinux, vmlinux.acpi, initrd.img, rootfs.img
#   $PREFIX/share/defaults/kata-containers/               the configurations as shipped
#   $PREFIX/libexec/vhost-device-vsock                    for hosts without /dev/vhost-vsock
#   /usr/local/bin/{containerd-shim-kata-v2,kata-ctl}     where containerd and people find them
#   /lib/systemd/system/kata-shim-zygote.{socket,service} off until somebody enables the socket
#   /etc/kata-containers/configuration.toml               for the administrator to change
# Invariants: the file in /etc is replaced or removed only while it is as shipped; `uninstall` removes what
# `install` wrote and then empty directories, nothing else; neither touches containerd or its configuration.
set -euo pipefail
cd "$(dirname "$0")/.."

PREFIX=${PREFIX:-/opt/kata-shim}
DESTDIR=${DESTDIR:-}
DESTDIR=${DESTDIR%/}
PREFIX=${PREFIX%/}
BIN=/usr/local/bin
ETC=/etc/kata-containers/configuration.toml
UNITS=/lib/systemd/system
# One for each place of installation: two of them have a zygote each.
ZYGOTE=/run/kata-shim-zygote/$(cksum <<<"$PREFIX" | cut -d" " -f1)
TARGET=$DESTDIR$PREFIX
GUEST=$TARGET/share/kata-containers
SHIPPED=$TARGET/share/defaults/kata-containers/configuration.toml
CLASSES=(fc clh dragonball) # runtime classes with a file of their own
SHIPPED_OTHERS=("${CLASSES[@]/#/${SHIPPED%.toml}-}")
SHIPPED_OTHERS=("${SHIPPED_OTHERS[@]/%/.toml}")
GUEST_FILES=(vmlinux vmlinux.acpi initrd.img rootfs.img manifest.json)

say() { printf '[install] %s\n' "$*"; }
die() { printf '[install] error: %s\n' "$*" >&2; exit 1; }

[[ $PREFIX == /* ]] || die "PREFIX must be absolute, not '$PREFIX'"
[[ -z $DESTDIR || $DESTDIR == /* ]] || die "DESTDIR must be absolute, not '$DESTDIR'"
[[ $PREFIX$DESTDIR != *[[:space:]]* ]] || die "PREFIX and DESTDIR must be without blanks"

# Is the file in /etc one that we wrote and nobody changed? Compared before the shipped one is replaced.
etc_is_ours() { [[ -f $DESTDIR$ETC && -f $SHIPPED ]] && cmp -s "$DESTDIR$ETC" "$SHIPPED"; }

install_python() {
    local python=$TARGET/venv/bin/python3 wheels=build/wheels
    # A new environment each time: nothing of an older version stays behind.
    rm -rf "$TARGET/venv" build/lib build/bdist.* "$wheels"
    /usr/bin/python3 -m venv --without-pip "$TARGET/venv"
    .venv/bin/python -m pip --quiet --python "$python" install --require-hashes -r scripts/requirements.lock
    .venv/bin/python -m pip --quiet wheel --no-deps --no-index --no-build-isolation --wheel-dir "$wheels" .
    .venv/bin/python -m pip --quiet --python "$python" install --no-deps --no-index "$wheels"/*.whl
    rm -rf build/lib build/bdist.* "$wheels"
    # Its console scripts name the staging directory, and are not the ones that are used.
    find "$TARGET/venv/bin" -type f -delete
}

install_programs() {
    local name
    install -d "$DESTDIR$BIN"
    .venv/bin/python -m shim.launch.launcher_script "$DESTDIR$BIN/containerd-shim-kata-v2" \
        --python "$TARGET/venv/bin/python3" --root "$DESTDIR" --zygote "$ZYGOTE"
    cat >"$DESTDIR$BIN/kata-ctl" <<EOF
#!$TARGET/venv/bin/python3 -I
import sys

from ctl.main import main

sys.exit(main())
EOF
    chmod 0755 "$DESTDIR$BIN/kata-ctl"
    if [[ -n $DESTDIR ]]; then
        sed -i "s|$DESTDIR/|/|g" "$DESTDIR$BIN/kata-ctl"
        sed -i "s|$DESTDIR/|/|g" "$TARGET/venv/pyvenv.cfg"
    fi
}

install_units() { # only what the compiled client can ask
    local unit
    [[ -x shim/launch/kata-start ]] || return 0
    for unit in kata-shim-zygote.socket kata-shim-zygote.service; do
        install -d "$DESTDIR$UNITS"
        sed -e "s|@SOCKET@|$ZYGOTE|; s|@PROGRAM@|$BIN/containerd-shim-kata-v2|" "config/$unit" >"$DESTDIR$UNITS/$unit"
        chmod 0644 "$DESTDIR$UNITS/$unit"
    done
}

install_guest() {
    local file
    install -d "$GUEST"
    for file in "${GUEST_FILES[@]}"; do
        # A new inode: a VM that runs from the old file keeps it.
        [[ -f build/guest/$file ]] || continue
        cp --reflink=auto "build/guest/$file" "$GUEST/$file.new"
        mv "$GUEST/$file.new" "$GUEST/$file"
    done
    if [[ -x build/vsock/usr/bin/vhost-device-vsock ]]; then
        install -D -m 0755 build/vsock/usr/bin/vhost-device-vsock "$TARGET/libexec/vhost-device-vsock"
    fi
}

install_configuration() {
    local replace=yes
    if [[ -e $DESTDIR$ETC ]] && ! etc_is_ours; then replace=no; fi
    install -d "$(dirname "$SHIPPED")" "$(dirname "$DESTDIR$ETC")"
    sed -e "s|/opt/kata-shim/share|$PREFIX/share|g" config/configuration-qemu.toml >"$SHIPPED"
    if [[ -x $TARGET/libexec/vhost-device-vsock ]]; then
        sed -i "s|^#vsock_daemon = .*|vsock_daemon = \"$PREFIX/libexec/vhost-device-vsock\"|" "$SHIPPED"
    fi
    chmod 0644 "$SHIPPED"
    local class
    for class in "${CLASSES[@]}"; do
        sed -e "s|/opt/kata-shim/share|$PREFIX/share|g" "config/configuration-$class.toml" >"${SHIPPED%.toml}-$class.toml"
        chmod 0644 "${SHIPPED%.toml}-$class.toml"
    done
    if [[ $replace == yes ]]; then
        install -m 0644 "$SHIPPED" "$DESTDIR$ETC"
    else
        say "kept: $ETC, which was changed; the one as shipped is $PREFIX/share/defaults/kata-containers/configuration.toml"
    fi
}

do_install() {
    [[ -x .venv/bin/python ]] || die "run \`make setup\` first"
    [[ -s build/guest/vmlinux ]] || die "the guest is not built: run \`make guest\`"
    say "programs and environment: $PREFIX/venv"
    install_python
    install_programs
    install_units
    say "guest: $PREFIX/share/kata-containers"
    install_guest
    install_configuration
    say "done; try: ctr run --rm --runtime io.containerd.kata.v2 IMAGE NAME uname -r"
}

do_uninstall() {
    local file
    if etc_is_ours; then rm -f "$DESTDIR$ETC"; elif [[ -e $DESTDIR$ETC ]]; then say "kept: $ETC, which was changed"; fi
    rm -f "$DESTDIR$BIN/containerd-shim-kata-v2" "$DESTDIR$BIN/kata-ctl" "$SHIPPED" "${SHIPPED_OTHERS[@]}" "$TARGET/libexec/vhost-device-vsock"
    rm -f "$DESTDIR$UNITS"/kata-shim-zygote.{socket,service}
    for file in "${GUEST_FILES[@]}"; do rm -f "$GUEST/$file"; done
    rm -rf "$TARGET/venv"
    for file in "$TARGET/share/defaults/kata-containers" "$TARGET/share/defaults" "$GUEST" "$TARGET/share" \
        "$TARGET/libexec" "$TARGET" "$(dirname "$DESTDIR$ETC")"; do
        rmdir --ignore-fail-on-non-empty "$file" 2>/dev/null || true
    done
    say "removed"
}

case ${1:-} in
install) do_install ;;
uninstall) do_uninstall ;;
*) die "usage: install.sh install|uninstall" ;;
esac
