-- wrk: every request has a sum of its own, and every answer must be that sum, or an honest 429 or 503.
local threads = {}

function setup(thread)
  thread:set("id", #threads)
  table.insert(threads, thread)
end

function init()
  right, busy, limited, wrong, first_wrong = 0, 0, 0, 0, ""
  key = os.getenv("ZEROBOOT_LOAD_KEY")
  math.randomseed(os.time() + id)
end

function request()
  -- Answers come back in order on each connection, but wrk does not say on which: the answer names its own request.
  local number = math.random(1, 1000000)
  local headers = { ["Content-Type"] = "application/json" }
  if key then headers["Authorization"] = "Bearer " .. key end
  return wrk.format("POST", "/v1/exec", headers, '{"code": "n = ' .. number .. '\\nprint(n, n * 3)"}')
end

function response(status, headers, body)
  if status == 200 then
    local n, sum = body:match('"stdout":"(%d+) (%d+)\\n"')
    if n and tonumber(n) * 3 == tonumber(sum) and body:find('"exit_code":0', 1, true) then
      right = right + 1
      return
    end
  elseif status == 503 and body:find('"code":"busy"', 1, true) and headers["retry-after"] then
    busy = busy + 1
    return
  elseif status == 429 and body:find('"code":"rate_limited"', 1, true) and headers["retry-after"] then
    limited = limited + 1
    return
  end
  wrong = wrong + 1
  if first_wrong == "" then first_wrong = status .. " " .. body end
end

function done(summary, latency, requests)
  local sums = { right = 0, busy = 0, limited = 0, wrong = 0 }
  for _, thread in ipairs(threads) do
    for name in pairs(sums) do sums[name] = sums[name] + thread:get(name) end
    if thread:get("first_wrong") ~= "" then print("WRONG: " .. thread:get("first_wrong")) end
  end
  local e = summary.errors
  print(string.format(
    'RESULT {"right": %d, "busy": %d, "limited": %d, "wrong": %d, "connect_errors": %d, "read_errors": %d, "write_errors": %d, "timeouts": %d, "seconds": %.3f, "p50_ms": %.3f, "p99_ms": %.3f, "max_ms": %.3f}',
    sums.right, sums.busy, sums.limited, sums.wrong, e.connect, e.read, e.write, e.timeout, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3))
end
