#!/usr/bin/env bash
# Make a certificate authority and the SuperLink's certificate, valid for the names by which nodes reach it.
#
#   certificates.sh FOLDER NAME...      for example: certificates.sh certificates superlink superlink.example.org 10.0.0.5
#
# FOLDER/authority.key signs further certificates and belongs in a safe, not on any machine of the federation. The
# SuperLink needs server.pem, server.key and superlink.secret, which its SuperExec shares; every machine needs ca.crt.
# Running it again renews the server's certificate under the same authority. DAYS=365 is how long it is valid.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$1; shift
days=${DAYS:-365}
umask 077
mkdir -p "$folder"
names=()
for name in "$@"; do
    case $name in
        *:*) names+=("IP:$name") ;;
        *[!0-9.]*) names+=("DNS:$name") ;;
        *) names+=("IP:$name") ;;
    esac
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
quietly() { "$@" 2> "$work/said" || { cat "$work/said" >&2; exit 1; }; }
if [ ! -f "$folder/authority.key" ]; then
    quietly openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 3650 -sha384 \
        -subj "/O=FedMetaNAS/CN=FedMetaNAS authority" -addext "keyUsage=critical,keyCertSign,cRLSign" \
        -keyout "$folder/authority.key" -out "$folder/ca.crt"
fi
quietly openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj "/O=FedMetaNAS/CN=$1" \
    -keyout "$folder/server.key" -out "$work/request"
cat > "$work/extensions" << END
basicConstraints=critical,CA:FALSE
extendedKeyUsage=serverAuth
subjectAltName=$(IFS=,; echo "${names[*]}")
END
quietly openssl x509 -req -in "$work/request" -CA "$folder/ca.crt" -CAkey "$folder/authority.key" -CAcreateserial \
    -days "$days" -sha384 -extfile "$work/extensions" -out "$folder/server.pem"
[ -f "$folder/superlink.secret" ] || openssl rand -hex 32 > "$folder/superlink.secret"
chmod 644 "$folder/ca.crt" "$folder/server.pem"
echo "$folder: certificate of ${names[*]}, valid for $days days"
