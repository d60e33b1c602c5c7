#!lua flags=allow-oom
-- A mail whose entry or letter someone deleted, and which is in no mailbox any more: nothing is left of it. `open` follows by `recount`.
-- KEYS 1 stream 2 index 3 starts 4 tries 5 due 6 dlq   ARGV n x {email_id, location}   -> n x (OK | STALE: it is there again, or elsewhere)
--#include stands
local answer = {}
for i = 1, #ARGV, 2 do
  local email_id, location = ARGV[i], ARGV[i + 1]
  if redis.call('HGET', KEYS[2], email_id) == location and not stands(KEYS[1], KEYS[6], location) then
    for mark = 2, 4 do redis.call('HDEL', KEYS[mark], email_id) end
    redis.call('ZREM', KEYS[5], string.sub(location, 3) .. '|' .. email_id)
    answer[#answer + 1] = 'OK'
  else
    answer[#answer + 1] = 'STALE'
  end
end
return answer
