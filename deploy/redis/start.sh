#!/bin/sh
# Starts Valkey or Redis for Jackpot: users from a template, everything written through before it is acknowledged, and
# writes refused, never data thrown away, when memory is full. Arguments go to the server.
#
#   REDIS_PASSWORD        of every role; a role of its own password has REDIS_PASSWORD_CONTROL_PLANE, …_ORCHESTRATOR,
#                         …_SCORER, …_LEARNER
#   REDIS_USERS           the template; /etc/jackpot/users.acl
#   REDIS_RUN_DIR         where the users are written, in memory at best; /tmp
#   REDIS_DATA_DIR        where the data lie; /data
#   REDIS_MAXMEMORY       1gb
#   REDIS_SERVER          valkey-server
set -eu
umask 077
: "${REDIS_PASSWORD:?must be set: nobody may connect without a password}"

rules="${REDIS_RUN_DIR:-/tmp}/users.acl"
server="${REDIS_SERVER:-valkey-server}"
grep -v '^#' "${REDIS_USERS:-/etc/jackpot/users.acl}" > "$rules"
case "$("$server" --version)" in
    # Redis 7.0 refuses to start on a rule about a command that it does not have yet.
    *v=7.0.*) sed 's/ +client|setinfo//' "$rules" > "$rules.new" && mv "$rules.new" "$rules" ;;
esac
for role in control-plane orchestrator scorer learner; do
    name="REDIS_PASSWORD_$(printf %s "$role" | tr a-z- A-Z_)"
    eval "password=\${$name:-\$REDIS_PASSWORD}"
    hash=$(printf %s "$password" | sha256sum | cut -d ' ' -f 1)
    sed "s/{{$role}}/$hash/" "$rules" > "$rules.new"
    mv "$rules.new" "$rules"
done
# The server has no use for them, and whoever looks at its environment none either.
unset REDIS_PASSWORD REDIS_PASSWORD_CONTROL_PLANE REDIS_PASSWORD_ORCHESTRATOR REDIS_PASSWORD_SCORER \
    REDIS_PASSWORD_LEARNER password

exec "$server" \
    --dir "${REDIS_DATA_DIR:-/data}" \
    --aclfile "$rules" \
    --appendonly yes --appendfsync always --save '' \
    --maxmemory "${REDIS_MAXMEMORY:-1gb}" --maxmemory-policy noeviction \
    "$@"
