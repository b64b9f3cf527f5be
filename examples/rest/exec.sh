# One exec. (Without keys, as `zeroboot serve` starts on loopback, the header may be left out.)
curl -X POST "${ZEROBOOT_BASE_URL:-http://127.0.0.1:8080}/v1/exec" \
  -H 'Content-Type: application/json' \
  -H "Authorization: Bearer ${ZEROBOOT_API_KEY:-}" \
  -d '{"code": "print(input().upper())", "stdin": "hello", "timeout_seconds": 5}'
