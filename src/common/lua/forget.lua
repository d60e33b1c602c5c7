#!lua flags=allow-oom
-- A mail whose entry or letter someone deleted, and which is in no mailbox any more: nothing is left of it. `open` follows by `recount`.
-- KEYS 1 stream 2 index 3 starts 4 tries 5 due 6 dlq
-- ARGV 1 group, then n x {email_id, location}   -> n x (OK | STALE: it is there again or elsewhere, or a worker holds it)
--#include stands
--#include standing
local answer = {}
for i = 2, #ARGV, 2 do
  local email_id, location = ARGV[i], ARGV[i + 1]
  local sid = string.sub(location, 3)
  if redis.call('HGET', KEYS[2], email_id) == location and not stands(KEYS[1], KEYS[6], location) and not pending(KEYS[1], ARGV[1], sid) then
    for mark = 2, 4 do redis.call('HDEL', KEYS[mark], email_id) end
    redis.call('ZREM', KEYS[5], sid .. '|' .. email_id)
    answer[#answer + 1] = 'OK'
  else
    answer[#answer + 1] = 'STALE'
  end
end
return answer
