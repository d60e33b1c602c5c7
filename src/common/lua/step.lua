#!lua flags=allow-oom
-- Keep what a step of a mail returned, only for the owner. A step is written once: what stands there stays.
-- KEYS 1 stream 2 steps of the mail
-- ARGV 1 group 2 consumer 3 stream id 4 delivery count 5 most steps 6 seconds that the steps of an unfinished mail are kept 7 step 8 JSON
-- -> OK | LOST | MANY
--#include fence
if held(KEYS[1], ARGV[1], ARGV[2], {ARGV[3]})[ARGV[3]] ~= ARGV[4] then return 'LOST' end
if redis.call('HEXISTS', KEYS[2], ARGV[7]) == 0 and redis.call('HLEN', KEYS[2]) >= tonumber(ARGV[5]) then return 'MANY' end
redis.call('HSETNX', KEYS[2], ARGV[7], ARGV[8])
redis.call('EXPIRE', KEYS[2], ARGV[6])
return 'OK'
