#!/bin/sh
# Plain curl: a chat, a stream, a completion, embeddings, and the status of an error.
#
#     OPENAI_BASE_URL=http://localhost:19327/v1 OPENAI_API_KEY=none sh curl.sh
set -eu

url=${OPENAI_BASE_URL:-http://localhost:19327/v1}

ask() { # path, JSON, more options of curl
    path=$1 body=$2
    shift 2
    curl -sS --max-time 300 "$url$path" -H "Authorization: Bearer ${OPENAI_API_KEY:-none}" \
        -H "Content-Type: application/json" -d "$body" "$@"
}

echo "== chat"
ask /chat/completions '{
  "messages": [{"role": "user", "content": "What is the capital of France?"}],
  "temperature": 0, "max_tokens": 24
}' --fail-with-body
echo

echo "== stream" # -N: show each event as it comes
ask /chat/completions '{
  "messages": [{"role": "user", "content": "What is the capital of France?"}],
  "temperature": 0, "max_tokens": 24, "stream": true, "stream_options": {"include_usage": true}
}' -N --fail-with-body

echo "== completion"
ask /completions '{"prompt": "What is the capital of France?", "temperature": 0, "max_tokens": 24}' --fail-with-body
echo

echo "== embeddings"
ask /embeddings '{"input": "今天天气真不错", "dimensions": 4}' --fail-with-body
echo

echo "== models"
curl -sS --fail-with-body "$url/models" -H "Authorization: Bearer ${OPENAI_API_KEY:-none}"
echo

echo "== error" # the body tells what is wrong, the status comes behind it
ask /chat/completions '{"messages": "Hello", "temperature": 3}' -w '\n%{http_code}\n'
