# shellcheck shell=sh
# Sourced by tests/run and tests/demo: what they need, installed where missing, and the way in.
# Debian packages by apt-get (as root), Python packages into .venv beside README.md.

top=$(cd "$(dirname "$0")/.." && pwd)
venv=$top/.venv

# program:package
needed="ip:iproute2 nft:nftables unshare:util-linux ifup:ifupdown dhclient:isc-dhcp-client
dnsmasq:dnsmasq-base systemd-analyze:systemd ping:iputils-ping
/usr/share/doc/python3-boto3:python3-boto3 /usr/share/doc/python3-requests:python3-requests
/usr/share/doc/python3-venv:python3-venv"
needed_for_vms="qemu-system-x86_64:qemu-system-x86 mmdebstrap:mmdebstrap mke2fs:e2fsprogs"

# Install what a list of program:package pairs asks for.
install_packages() {
    missing=
    for pair in "$@"; do
        probe=${pair%:*}
        PATH=$PATH:/usr/sbin:/sbin command -v "$probe" >/dev/null || [ -d "$probe" ] ||
            missing="$missing ${pair#*:}"
    done
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        echo "missing Debian packages; as root: apt-get install$missing" >&2
        return 1
    fi
    echo "installing Debian packages:$missing" >&2
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086  # a list of words
    apt-get install -qq --no-install-recommends $missing >/dev/null 2>&1 ||
        { apt-get update -qq && apt-get install -qq --no-install-recommends $missing >/dev/null; }
}

install_python_packages() {
    wanted=$(cat "$top/pyproject.toml" "$top/tests/lab/setup.sh" | sha256sum)
    [ "$(cat "$venv/made-for" 2>/dev/null)" != "$wanted" ] || return 0
    echo "making $venv (Python packages of the test group in pyproject.toml)" >&2
    rm -rf "$venv"
    /usr/bin/python3 -m venv "$venv"
    "$venv/bin/pip" install -qq --upgrade 'pip>=25.1' # the first that knows --group
    (cd "$top" && "$venv/bin/pip" install -qq --group test)
    echo "$wanted" >"$venv/made-for"
}

# Run a command inside fresh namespaces: nothing in there reaches this machine's network, and all
# of it is gone, with its processes, when the command ends or this shell is killed.
enter_lab() {
    user=
    [ "$(id -u)" = 0 ] || user='--user --map-root-user'
    # shellcheck disable=SC2086  # a list of words
    exec setpriv --pdeathsig KILL unshare $user --net --mount --pid --fork --kill-child --mount-proc \
        sh -c 'mount -t tmpfs lab /mnt && mkdir /mnt/tmp && "$@"' sh \
        env ENI_LAB=inside TMPDIR=/mnt/tmp PATH="$PATH:/usr/sbin:/sbin" "$top/tests/lab/worker" "$@"
}

# shellcheck disable=SC2086  # a list of words
install_packages $needed && install_python_packages
