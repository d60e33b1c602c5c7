#!lua flags=allow-oom
-- DEAD -> DONE: a dead letter is given up for good; its id counts as processed, so nothing brings the mail back.
-- KEYS 1 index 2 dlq 3 open 4 results 5.. processed sets
-- ARGV 1 seconds a processed id is kept 2 most results, then n x {dead-letter id, email_id, member, number of its set from 1, field in open}
--      email_id '': a foreign entry, known to no index
-- -> n x (OK | NONE)
local answer = {}
for i = 3, #ARGV, 5 do
  local dead, email_id = ARGV[i], ARGV[i + 1]
  if #redis.call('XRANGE', KEYS[2], dead, dead) == 0 or (email_id ~= '' and redis.call('HGET', KEYS[1], email_id) ~= 'D:' .. dead) then
    answer[#answer + 1] = 'NONE'
  else
    if email_id ~= '' then
      local set = KEYS[4 + tonumber(ARGV[i + 3])]
      redis.call('SADD', set, ARGV[i + 2])
      redis.call('EXPIRE', set, ARGV[1])
      redis.call('HDEL', KEYS[1], email_id)
      if redis.call('HINCRBY', KEYS[3], ARGV[i + 4], -1) <= 0 then redis.call('HDEL', KEYS[3], ARGV[i + 4]) end
      redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[2], '*', 'email_id', email_id, 'outcome', 'discarded', 'result', '{}')
    end
    redis.call('XDEL', KEYS[2], dead)
    answer[#answer + 1] = 'OK'
  end
end
return answer
