#!/bin/sh
# Starts the platform's container of docker-compose.yml: a token for Prometheus, made once, then `jackpot …`.
set -eu
token="${SCRAPE_TOKEN_FILE:-/run/jackpot/token}"
if [ ! -s "$token" ] || [ ! -s "$JACKPOT_DATA_DIR/tokens.json" ]; then
    # Only Prometheus's container shares this directory; it runs as another user. The token can read, and no more.
    (umask 022 && jackpot token create --name prometheus --scope read --expires never > "$token.new")
    mv "$token.new" "$token"
fi
exec jackpot "$@"
