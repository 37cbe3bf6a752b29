#!/usr/bin/env bash
# Make the key by which the SuperLink knows a node, and the secret between the node's two processes.
#
#   node-key.sh FOLDER NAME...          for example: node-key.sh keys site-1 site-2
#
# FOLDER/NAME stays on the node's machine. FOLDER/NAME.pub is what `flwr supernode register` takes. FOLDER/NAME.secret
# stays on the node's machine as well. A key that is there is kept.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$1; shift
umask 077
mkdir -p "$folder"
for name in "$@"; do
    [ -f "$folder/$name" ] || ssh-keygen -q -t ecdsa -b 384 -N "" -C "$name" -f "$folder/$name"
    [ -f "$folder/$name.secret" ] || openssl rand -hex 32 > "$folder/$name.secret"
    echo "$folder/$name: $(ssh-keygen -lf "$folder/$name.pub")"
done
