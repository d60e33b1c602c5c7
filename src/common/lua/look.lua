#!lua flags=allow-oom
-- The requests to look again at the mail of a mailbox, in the order they came: one is added, or the first is struck out when it is done.
-- KEYS 1 intake hash   ARGV 1 ask | done 2 request: an ISO date, `late:` before it for mail that should be known
-- -> what stands then, separated by commas
local standing = {}
for request in string.gmatch(redis.call('HGET', KEYS[1], 'resync') or '', '[^,]+') do standing[#standing + 1] = request end
if ARGV[1] == 'done' then
  if standing[1] == ARGV[2] then table.remove(standing, 1) end
else
  local waits = false
  for i = 2, #standing do waits = waits or standing[i] == ARGV[2] end  -- the first may be under way, past what is meant now
  if not waits then standing[#standing + 1] = ARGV[2] end
end
local text = table.concat(standing, ',')
if text == '' then redis.call('HDEL', KEYS[1], 'resync') else redis.call('HSET', KEYS[1], 'resync', text) end
return text
