#!/usr/bin/env bash
# Makes the ordinary users alice and bob, each with a key that opens the login node's sshd. Harmless when repeated.
set -euo pipefail
for user in alice bob; do
    # '*' (no password) and not '!' (locked): sshd without PAM refuses a locked user, even with a good key
    id "$user" >/dev/null 2>&1 || useradd --create-home --shell /bin/bash --password '*' "$user"
    home=$(getent passwd "$user" | cut -d: -f6)
    [ -s "$home/.ssh/id_ed25519" ] && continue
    command -v ssh-keygen >/dev/null || continue          # an image can be built before openssh is there
    install -d -m 700 -o "$user" -g "$user" "$home/.ssh"
    runuser -u "$user" -- ssh-keygen -q -t ed25519 -N '' -C "$user" -f "$home/.ssh/id_ed25519"
    install -m 600 -o "$user" -g "$user" "$home/.ssh/id_ed25519.pub" "$home/.ssh/authorized_keys"
done
