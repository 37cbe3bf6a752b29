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
request=$(mktemp)
trap 'rm -f "$request"' EXIT
if [ ! -f "$folder/authority.key" ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -noenc -days 3650 -sha384 \
        -subj "/O=FedMetaNAS/CN=FedMetaNAS authority" -addext "keyUsage=critical,keyCertSign,cRLSign" \
        -keyout "$folder/authority.key" -out "$folder/ca.crt" 2> /dev/null
fi
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-384 -noenc -subj "/O=FedMetaNAS/CN=$1" \
    -keyout "$folder/server.key" -out "$request" 2> /dev/null
openssl x509 -req -in "$request" -CA "$folder/ca.crt" -CAkey "$folder/authority.key" -CAcreateserial \
    -days "$days" -sha384 -out "$folder/server.pem" -extfile <(
        echo "basicConstraints=critical,CA:FALSE"
        echo "extendedKeyUsage=serverAuth"
        echo "subjectAltName=$(IFS=,; echo "${names[*]}")"
    ) 2> /dev/null
[ -f "$folder/superlink.secret" ] || openssl rand -hex 32 > "$folder/superlink.secret"
chmod 644 "$folder/ca.crt" "$folder/server.pem"
echo "$folder: certificate of ${names[*]}, valid for $days days"
