#!lua flags=allow-oom
-- DEAD -> DONE: a dead letter is given up for good; its id counts as processed, so nothing brings the mail back.
-- KEYS 1 index 2 dlq 3 open 4 results 5 stream 6.. n hashes of steps, one a letter, then the processed sets
-- ARGV 1 seconds a processed id is kept 2 most results, then n x {dead-letter id, email_id, member, number of its set from 1, field in open}
--      email_id '': no mail of ours, known to no index
-- -> n x (OK | NONE: no such dead letter | STALE: the mail lives or was done elsewhere, the letter is removed)
--#include stands
local n, answer = (#ARGV - 2) / 5, {}
for i = 3, #ARGV, 5 do
  local dead, email_id, open = ARGV[i], ARGV[i + 1], ARGV[i + 4]
  local location = email_id ~= '' and redis.call('HGET', KEYS[1], email_id)
  local here = location == 'D:' .. dead
  if #redis.call('XRANGE', KEYS[2], dead, dead) == 0 then
    answer[#answer + 1] = 'NONE'
  elseif location and not here and stands(KEYS[5], KEYS[2], location) then
    redis.call('XDEL', KEYS[2], dead)
    answer[#answer + 1] = 'STALE'
  else
    local verdict = 'OK'
    if email_id ~= '' then
      local set = KEYS[5 + n + tonumber(ARGV[i + 3])]
      if redis.call('SADD', set, ARGV[i + 2]) == 0 then
        verdict = 'STALE'
      else
        redis.call('EXPIRE', set, ARGV[1])
        redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[2], '*', 'email_id', email_id, 'outcome', 'discarded', 'result', '{}')
      end
      if location then
        redis.call('HDEL', KEYS[1], email_id)
        if redis.call('HINCRBY', KEYS[3], open, -1) <= 0 then redis.call('HDEL', KEYS[3], open) end
      end
      redis.call('DEL', KEYS[5 + (i + 2) / 5])
    end
    redis.call('XDEL', KEYS[2], dead)
    answer[#answer + 1] = verdict
  end
end
return answer
