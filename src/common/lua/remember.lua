#!lua flags=allow-oom
-- The results say that these mails are done, their processed ids are gone: put the ids back, so that nothing brings the mails again.
-- KEYS 1 index 2.. processed sets   ARGV 1 seconds a processed id is kept, then n x {email_id, member, number of its set from 1}
-- -> n x (OK | LIVE: it has come again meanwhile)
local answer = {}
for i = 2, #ARGV, 3 do
  local set = KEYS[1 + tonumber(ARGV[i + 2])]
  if redis.call('HEXISTS', KEYS[1], ARGV[i]) == 1 then
    answer[#answer + 1] = 'LIVE'
  else
    redis.call('SADD', set, ARGV[i + 1])
    redis.call('EXPIRE', set, ARGV[1])
    answer[#answer + 1] = 'OK'
  end
end
return answer
