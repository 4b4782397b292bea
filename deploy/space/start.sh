# Starts the server of a Space, by the variables that README.md names.
set -eu
folder=$HOME/videos
if [ -w /data ]; then folder=/data/videos; fi
# shellcheck disable=SC2086 # several options
set -- ${MODEL:+"$MODEL"} --host 0.0.0.0 --port 7860 --folder "$folder" --embedded-in https://huggingface.co ${OPTIONS:-}
if [ -n "${API_KEYS:-}" ]; then
  (umask 077 && printf '%s\n' "$API_KEYS" >"$HOME/keys.txt")
  exec cogvx-fast serve "$@" --api-keys-file "$HOME/keys.txt"
fi
exec cogvx-fast serve "$@" --insecure
