#!/bin/sh
# Sends completions to $1 for ever: eight conversations in turn, each behind a long system prompt.
conversation=0
turn=0
word="You are a careful assistant that answers from the handbook below and from nothing else. "
handbook=""
i=0
while [ "$i" -lt 60 ]; do
  handbook="$handbook$word"
  i=$((i + 1))
done
while true; do
  body="{\"model\":\"sim-model\",\"max_tokens\":24,\"stream\":true,\"stream_options\":{\"include_usage\":true},\"prompt\":\"Handbook $conversation. ${handbook}Question $turn: what now?\"}"
  wget -q -O /dev/null --header "content-type: application/json" --post-data "$body" "$1" &
  conversation=$(((conversation + 1) % 8))
  turn=$((turn + 1))
  sleep 0.3
done
