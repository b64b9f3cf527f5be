-- wrk: every request prints a number of its own, and its answer must be that number, or an honest 429 or 503.
-- With one connection a thread (wrk does not say on which connection an answer came) it is exactly the request's own.
-- ZEROBOOT_LOAD_MIX: some take all the memory or all the descriptors that their sandbox has, which is their own error.
local threads = {}
local counts = { "right", "busy", "limited", "failed", "not_ready", "stopped", "wrong" }

function setup(thread)
  thread:set("id", #threads)
  table.insert(threads, thread)
end

function init()
  right, busy, limited, failed, not_ready, stopped, wrong, first_wrong = 0, 0, 0, 0, 0, 0, 0, ""
  key, mix, number = os.getenv("ZEROBOOT_LOAD_KEY"), os.getenv("ZEROBOOT_LOAD_MIX"), 0
end

function request()
  number = number + 1
  expected = id .. "-" .. number
  local headers = { ["Content-Type"] = "application/json" }
  if key then headers["Authorization"] = "Bearer " .. key end
  local code, more = "print('" .. expected .. "', 6 * 7, flush=True)", ""
  expected_code = 0
  if mix then
    more = ', "timeout_seconds": 5'
    if number % 9 == 0 then code, expected_code = code .. "\\nx = bytearray(1 << 40)", 1 end
    if number % 9 == 1 then code, expected_code = "x = []\\ntry:\\n while True: x.append(open('/dev/null'))\\nexcept OSError: " .. code, 0 end
  end
  return wrk.format("POST", "/v1/exec", headers, '{"code": "' .. code .. '"' .. more .. '}')
end

local function has(body, code) return body:find('"code":"' .. code .. '"', 1, true) end

function response(status, headers, body)
  if status == 200 then
    if body:find('"stdout":"' .. expected .. ' 42\\n"', 1, true) and body:find('"exit_code":' .. expected_code, 1, true) then
      right = right + 1
      return
    end
    if mix and body:find('"outcome":"deadline_passed"', 1, true) then
      stopped = stopped + 1
      return
    end
  elseif status == 429 and has(body, "rate_limited") and headers["retry-after"] then
    limited = limited + 1
    return
  elseif status == 503 and has(body, "busy") and headers["retry-after"] then
    busy = busy + 1
    return
  elseif status == 503 and has(body, "not_ready") and headers["retry-after"] then
    not_ready = not_ready + 1
    return
  elseif status == 500 and has(body, "sandbox_failed") then
    failed = failed + 1
    return
  end
  wrong = wrong + 1
  if first_wrong == "" then first_wrong = "expected " .. expected .. ", got " .. status .. " " .. body end
end

function done(summary, latency, requests)
  local fields, shown = {}, false
  for _, name in ipairs(counts) do
    local sum = 0
    for _, thread in ipairs(threads) do sum = sum + thread:get(name) end
    table.insert(fields, string.format('"%s": %d', name, sum))
  end
  for _, thread in ipairs(threads) do
    if not shown and thread:get("first_wrong") ~= "" then
      print("WRONG: " .. thread:get("first_wrong"))
      shown = true
    end
  end
  local e = summary.errors
  print(string.format(
    'RESULT {%s, "connect_errors": %d, "read_errors": %d, "write_errors": %d, "timeouts": %d, "seconds": %.3f, "p50_ms": %.3f, "p99_ms": %.3f, "max_ms": %.3f}',
    table.concat(fields, ", "), e.connect, e.read, e.write, e.timeout, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3))
end
